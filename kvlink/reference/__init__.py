"""What every operator means, in plain fp32 torch. Slow on purpose; imports only kvlink.layout."""

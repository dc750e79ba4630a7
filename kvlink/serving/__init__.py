"""Reference serving loop: one prefill and one decode process over one KV layout."""

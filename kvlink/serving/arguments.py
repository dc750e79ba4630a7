"""The command line of `kvlink generate`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence

from kvlink import _C
from kvlink.serving.options import (
    DTYPES,
    KV_DTYPES,
    LAYOUTS,
    PATHS,
    Options,
    SideOptions,
    side_threads,
)
from kvlink.serving.request import Defaults


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parsed and checked; exits with status 2 and a message otherwise, as argparse does."""
    parser = argparse.ArgumentParser(
        prog="kvlink generate",
        description="Generates text with two processes: one prefills, one decodes, and the KV "
        "cache moves from one to the other layer by layer.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="Hugging Face checkpoint directory")
    add("--input", default="-", metavar="FILE", help="JSON lines with prompt or prompt_token_ids; "
        "- is standard input")  # fmt: skip
    add("--output", default="-", metavar="FILE", help="JSON lines, in input order; - is standard "
        "output")  # fmt: skip
    add("--report", metavar="FILE", help="write a JSON report there; - prints a readable one to "
        "standard error")  # fmt: skip
    add_generation_arguments(parser)
    arguments = parser.parse_args(argv)
    if arguments.top_p == 0:
        parser.error("argument --top-p: expected more than 0; got 0")
    return arguments


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything but the model and the files."""
    count, positive = _integer(0), _integer(1)
    sampling = parser.add_argument_group("sampling (a line may say otherwise)")
    add = sampling.add_argument
    add("--max-new-tokens", type=positive, default=128, metavar="N", help="tokens per request")
    add("--temperature", type=_number(0.0, math.inf), default=0.0, metavar="X", help="0 is greedy")
    add("--top-p", type=_number(0.0, 1.0), default=1.0, metavar="X",
        help="sample from the likeliest tokens of that joint probability")  # fmt: skip
    add("--seed", type=_integer(0, 2**64 - 1), default=0, metavar="N",
        help="line i samples with N + i")  # fmt: skip
    add("--ignore-eos", action="store_true", help="go on to the last token allowed")

    cache = parser.add_argument_group("KV cache")
    for side in ("prefill", "decode"):
        add = cache.add_argument
        add(f"--{side}-page-size", type=_integer(1, 256), default=16, metavar="N",
            help=f"tokens in a page of {side}")  # fmt: skip
        add(f"--{side}-layout", choices=LAYOUTS, default="nhd", help="order within a page")
        add(f"--{side}-kv-dtype", choices=KV_DTYPES, default="auto",
            help="stored type; auto is the model's")  # fmt: skip
        add(f"--{side}-num-pages", type=count, default=0, metavar="N",
            help="pages; 0 sizes the pool to the input and the memory")  # fmt: skip
    cache.add_argument("--num-pages", type=count, default=0, metavar="N",
        help="pages on either side, unless said for that side")  # fmt: skip
    cache.add_argument("--enable-prefix-caching", action=argparse.BooleanOptionalAction,
        default=True, help="prompts that begin alike share pages: that part is computed, sent and "
        "read once")  # fmt: skip

    run = parser.add_argument_group("running")
    add = run.add_argument
    add("--dtype", choices=DTYPES, default="auto", help="of weights and activations; auto is the "
        "checkpoint's")  # fmt: skip
    add("--max-num-seqs", type=positive, default=64, metavar="N", help="sequences decoded at once")
    add("--max-batch-tokens", type=positive, default=1024, metavar="N",
        help="prompt tokens in a prefill step; longer prompts go in chunks")  # fmt: skip
    add("--grant-ttl", type=_number(0.001, 86400.0), default=60.0, metavar="S",
        help="seconds without a sign of life of prefill after which decode takes back the pages "
        "that it granted")  # fmt: skip
    add("--prefill-ranks", type=_integer(1, _C.MAX_LINKS), default=1, metavar="N",
        help="prefill processes, each of which sends its part of the KV heads")  # fmt: skip
    add("--path", choices=PATHS, default="auto", help="how the KV cache moves; auto is the fastest "
        "that there is")  # fmt: skip
    add("--threads", type=count, default=0, metavar="N",
        help="CPU threads; 0 takes as many as there are CPUs. Decode has all of them, so have the "
        "ranks of prefill together")  # fmt: skip
    for side, who in (("prefill", "each rank of prefill"), ("decode", "decode")):
        add(f"--{side}-threads", type=count, default=0, metavar="N",
            help=f"those of {who}, if not as --threads says")  # fmt: skip


def options_from(arguments: argparse.Namespace, model_dir: str) -> Options:
    """What the workers need to know."""
    threads = side_threads(arguments.threads, arguments.prefill_ranks)
    prefill, decode = (
        SideOptions(
            page_size=getattr(arguments, f"{side}_page_size"),
            layout=getattr(arguments, f"{side}_layout"),
            kv_dtype=getattr(arguments, f"{side}_kv_dtype"),
            num_pages=getattr(arguments, f"{side}_num_pages") or arguments.num_pages,
            num_threads=getattr(arguments, f"{side}_threads") or num_threads,
        )
        for side, num_threads in zip(("prefill", "decode"), threads, strict=True)
    )
    return Options(
        model_dir=model_dir,
        dtype=arguments.dtype,
        prefill=prefill,
        decode=decode,
        max_num_seqs=arguments.max_num_seqs,
        max_batch_tokens=arguments.max_batch_tokens,
        ignore_eos=arguments.ignore_eos,
        grant_ttl_s=arguments.grant_ttl,
        prefill_ranks=arguments.prefill_ranks,
        path=None if arguments.path == "auto" else arguments.path,
        prefix_caching=arguments.enable_prefix_caching,
    )


def defaults_from(arguments: argparse.Namespace) -> Defaults:
    """What a line that does not say otherwise gets."""
    return Defaults(
        arguments.max_new_tokens, arguments.temperature, arguments.top_p, arguments.seed
    )


def _integer(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected {low} to {high}; got {value}")
        return value

    parse.__name__ = "integer"
    return parse


def _number(low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = float(text)
        if not low <= value <= high or not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"expected a number of {low} to {high}; got {text}")
        return value

    parse.__name__ = "number"
    return parse

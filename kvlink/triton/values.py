"""Stored values in kernels: to float32 and back, bit for bit as docs/kv_layout.md says.

A KIND is a dtype's canonical name. Float8 travels as uint8, since not every device and not the
interpreter knows its types; so its conversions are integer arithmetic.
"""

from __future__ import annotations

import triton
import triton.language as tl

if not hasattr(triton, "knobs"):
    raise ImportError(f"kvlink.triton needs triton 3.4 or later; got {triton.__version__}")

# NOTE: the interpreter multiplies bfloat16 as if it were integers, so there we take float32.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
_NAN_BITS = tl.constexpr(0x7FC00000)
_TINY = tl.constexpr(2.0**-126)  # the smallest normal float32
_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in float32, whatever the operands."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def to_float32(x, KIND: tl.constexpr):
    """Stored elements as float32; exact."""
    if KIND == "float8_e4m3":
        bits = x.to(tl.uint32)
        magnitude = bits & 0x7F
        normal = (magnitude << 20) + 0x3C000000  # the exponent's bias: 127 - 7
        subnormal = (magnitude.to(tl.float32) * 0.001953125).to(tl.uint32, bitcast=True)
        value = tl.where(magnitude < 8, subnormal, normal)
        value = tl.where(magnitude == 0x7F, _NAN_BITS, value)
        return (value | ((bits & 0x80) << 24)).to(tl.float32, bitcast=True)
    elif KIND == "float8_e5m2":
        return (x.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return x.to(tl.float32)


@triton.jit
def to_operand(x, KIND: tl.constexpr, OPERAND: tl.constexpr, NATIVE_FP8: tl.constexpr):
    """Stored elements as the dtype that a product takes; exact where it holds them all."""
    if KIND == "float8_e4m3" and NATIVE_FP8:
        return x.to(tl.float8e4nv, bitcast=True).to(tl.float16).to(OPERAND)
    elif KIND == "float8_e4m3" or KIND == "float8_e5m2" or KIND == "int8":
        return to_float32(x, KIND).to(OPERAND)
    else:
        return x.to(OPERAND)


@triton.jit
def from_float32(x, KIND: tl.constexpr):
    """Float32 rounded to nearest even into the stored form; float8 and int8 saturate."""
    if KIND == "bfloat16":
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet = (bits >> 16) | 0x40
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        return tl.where(is_nan, quiet, rounded).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    elif KIND == "float16":
        return x.to(tl.float16)
    elif KIND == "float8_e4m3":
        return _to_float8(x, 3, 7, 448.0)
    elif KIND == "float8_e5m2":
        return _to_float8(x, 2, 15, 57344.0)
    elif KIND == "int8":
        whole = tl.minimum(tl.maximum(tl.where(x == x, x, 0.0), -127.0), 127.0)
        return ((whole + 12582912.0) - 12582912.0).to(tl.int8)  # 1.5 * 2**23 leaves no fraction
    else:
        return x


@triton.jit
def _to_float8(x, MANTISSA: tl.constexpr, BIAS: tl.constexpr, LARGEST: tl.constexpr):
    signed = x.to(tl.uint32, bitcast=True)
    is_nan = (signed & 0x7FFFFFFF) > 0x7F800000
    value = tl.minimum((signed & 0x7FFFFFFF).to(tl.float32, bitcast=True), LARGEST)
    bits = value.to(tl.uint32, bitcast=True)
    DROPPED: tl.constexpr = 23 - MANTISSA
    rounded = (bits + ((1 << (DROPPED - 1)) - 1) + ((bits >> DROPPED) & 1)) >> DROPPED
    normal = rounded - ((127 - BIAS) << MANTISSA)
    # Adding this makes one unit in the last place of the sum the step between subnormals.
    MAGIC: tl.constexpr = 2.0 ** (24 - BIAS - MANTISSA)
    MAGIC_BITS: tl.constexpr = (127 + 24 - BIAS - MANTISSA) << 23
    subnormal = (value + MAGIC).to(tl.uint32, bitcast=True) - MAGIC_BITS
    code = tl.where(value < 2.0 ** (1 - BIAS), subnormal, normal)
    code = tl.where(is_nan, 0x7F, code)
    return (code | ((signed >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def from_bits(bits, KIND: tl.constexpr):
    """Unsigned integers as the stored elements that the functions above take."""
    if KIND == "float32":
        return bits.to(tl.float32, bitcast=True)
    elif KIND == "float16":
        return bits.to(tl.float16, bitcast=True)
    elif KIND == "bfloat16":
        return bits.to(tl.bfloat16, bitcast=True)
    elif KIND == "int8":
        return bits.to(tl.int8, bitcast=True)
    else:
        return bits


@triton.jit
def to_bits(x, KIND: tl.constexpr):
    """Stored elements as unsigned integers."""
    if KIND == "float32":
        return x.to(tl.uint32, bitcast=True)
    elif KIND == "float16" or KIND == "bfloat16":
        return x.to(tl.uint16, bitcast=True)
    elif KIND == "int8":
        return x.to(tl.uint8, bitcast=True)
    else:
        return x


@triton.jit
def largest_finite(rows):
    """The largest finite magnitude of each of the rows [R, D], 0 if there is none."""
    magnitude = tl.abs(rows)
    return tl.max(tl.where(magnitude < _INFINITY, magnitude, 0.0), 1)


@triton.jit
def row_scales(largest, KIND: tl.constexpr):
    """What "token_head" stores for rows of these largest magnitudes: float32 [R]."""
    if KIND == "float8_e4m3":
        scale = tl.div_rn(largest, tl.full(largest.shape, 448.0, tl.float32))
    elif KIND == "float8_e5m2":
        scale = tl.div_rn(largest, tl.full(largest.shape, 57344.0, tl.float32))
    elif KIND == "int8":
        scale = tl.div_rn(largest, tl.full(largest.shape, 127.0, tl.float32))
    else:
        scale = tl.full(largest.shape, 1.0, tl.float32)
    return tl.where(scale >= _TINY, scale, 1.0)

"""Where does one way of computing a product start to win? Every measured number, in one place; but
those of convolutions, which `quantjax.ops.conv` weighs against each other.

Measured with jax 0.10.2 on two cores of an Intel Xeon with AVX512, VNNI and AMX (2 MiB of L2 a
core), busy with other work, so ratios are good to a third: medians, interleaved in one process, to
jax float32 of the same shape, with several weights in turn so that they come from memory.
`python -m experiments.measure_thresholds` measures again."""

# blocked.py: floats of a block, 1 MiB in float32. 4096 x 4096 int8, 8 rows of x: 2^17 2.0,
# 2^18 2.4, 2^19 2.9, 2^20 2.6; 2 rows: 1.7, 2.0, 1.7, 1.1. Dequantized as a whole: 0.3.
BLOCK_ELEMENTS = 2**18
# A block that can not be made smaller may be so large before the cache is lost.
BLOCK_LIMIT = 2**20

# vector.py: codes whose products are written out. 4096 x 4096 int8, one row: 8 terms 1.7,
# 16 2.6, 32 3.2, 64 2.5. int4: 16 codes 3.2, 32 3.2, 64 3.1, and compiling takes longer with each.
TERMS = 32
PACKED_TERMS = 16

# weight_only.py: rows of x that go through vector.py one by one. 4096 x 4096, 2 rows: int8 2.8
# against 2.0 in blocks, int4 in groups of 32 4.3 against 2.8; 4 rows: int8 2.0 against 1.9.
VECTOR_ROWS = 2
# integer.py: codes of a weight from which one or two rows of codes go vector by vector too. To
# float32, against the best form of the integer product, one row: 4096 x 4096 2.8 against 0.7,
# 1024 x 1024 1.6 against 1.7; two rows: 2.3 against 1.1, 1.5 against 2.4. Summed over its last
# axis a weight needs no new layout: 4096 x 4096 1.3 against 2.3.
VECTOR_CODES = 2**21
# Weights below are as fast dequantized as a whole. One row of x: 256 x 256 int8 1.4 against 1.1,
# 512 x 512 1.5 against 0.9, 1024 x 1024 3.0 against 0.9.
SMALL_WEIGHT = 2**17
# Up to so many elements the float copy stays in the cache, so that blocks win at few rows alone:
# 1024 x 1024 int8, 8 rows 1.7 against 1.2; 64 rows 0.9 against 0.9.
CACHED_WEIGHT, CACHED_ROWS = 2**21, 16
# 4096 x 4096 in blocks against dequantized as a whole: 64 rows int8 1.5 against 0.4, int4 0.9
# against 0.3; 256 rows 1.3 against 0.7, 0.9 against 0.5; 1024 rows 0.7 against 0.9.
BLOCK_ROWS = 256

# grouped.py: a loop over groups against the float product of the dequantized weight, both to
# float32. 1024 x 1024, 8 rows: groups of 32 5.3 and 0.3, 64 2.4 and 0.8; 128 rows: groups of 32 0.8
# and 0.6, 64 1.7 and 0.8; 512 rows: groups of 32 0.9 and 1.1, 128 2.1 and 0.9. Shorter groups than
# 32 are left to floats.
SHORT_GROUP = 32
SHORT_GROUP_ROWS = 128

# digits.py: how many times as fast as float32 integers are, by `probe`, where three digits pay.
# Three times the rows want 3, but the product of the probe is small: calling it takes as long in
# all forms, so it says 3.0 to 8.4 on the busy machine that was measured, where digits won always:
# 512 rows of 1024 x 1024 int8 2.2 against 1.0 dequantized as a whole, 2048 of 2048 x 2048 1.5
# against 1.0, int4 the same; 256 of 512 x 512 1.5 against 0.9.
DIGITS_SPEEDUP = 2.5
# From so many rows digits win over blocks: 1024 x 1024 int8, 4 rows 1.3 and 0.6, 8 rows 2.1 and
# 1.1, 32 rows 3.5 and 1.5, int4 2.5 and 1.2; twice as many from CACHED_WEIGHT on: 4096 x 4096,
# 8 rows 1.5 and 2.0, int4 1.1 and 1.6.
DIGIT_ROWS = 8

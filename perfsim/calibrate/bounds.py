"""Where the search for a curve's coefficients begins, and between which values it looks.

Some coefficients describe a benchmark, not a kernel (`NUISANCE`): they are fitted with a curve and never stored in it.
"""

from __future__ import annotations

from perfsim.calibrate.rows import Kind

# Start, lowest and highest value of every coefficient; the search runs over logarithms. Highest values that are not
# physical limits (1 for fractions) only keep the search finite.
Bounds = dict[str, tuple[float, float, float]]
US = 1e-6
RESIDENT: Bounds = {"gain": (0.5, 0.01, 20.0), "share": (0.8, 0.2, 2.0)}
BOUNDS: dict[Kind, Bounds] = {
    "gemm": {
        "launch": (3 * US, 0.3 * US, 40 * US), "ramp": (4 * US, 0.01 * US, 40 * US), "ramp_depth": (2e3, 50.0, 2e4),
        "ramp_sharpness": (1.15, 1.0, 8.0), "bandwidth": (0.85, 0.2, 1.0), "compute": (0.8, 0.1, 1.0),
        "depth_padding": (100.0, 1.0, 4000.0), "edge": (40.0, 0.01, 2000.0), "idle": (0.5, 0.001, 1.0),
        "idle_depth": (2e4, 500.0, 1e6), "tail": (0.1, 0.0001, 1.0), "throttle": (0.1, 0.001, 1.0),
        "throttle_seconds": (100 * US, 1 * US, 10_000 * US), "sharpness": (3.0, 1.0, 12.0),
    },
    "decode": {
        "launch": (8 * US, 1 * US, 40 * US), "bandwidth": (0.85, 0.1, 1.0), "tile": (3 * US, 0.05 * US, 60 * US),
        "sm_bandwidth": (4e10, 2e9, 1e12), "splits": (32.0, 1.0, 512.0), "ramp": (3 * US, 0.01 * US, 80 * US),
        "ramp_bytes": (2e7, 1e6, 5e8),
    },
    "prefill": {
        "launch": (10 * US, 1 * US, 40 * US), "compute": (0.8, 0.1, 1.0), "head_padding": (50.0, 0.1, 500.0),
        "bandwidth": (0.7, 0.05, 1.0), "critical_rows": (50.0, 0.1, 600.0), "tile": (10e-9, 0.01e-9, 400e-9),
        "kv_tile": (10e-9, 0.01e-9, 400e-9), "diagonal": (64.0, 0.1, 1000.0), "packed": (2.0, 1.0, 16.0),
        "cut": (100.0, 1.0, 2000.0),
    },
    "collective": {},  # see COLLECTIVE
    "stream": {"launch": (2 * US, 0.3 * US, 40 * US), "bandwidth": (0.85, 0.01, 1.0), "column": (5e-11, 1e-13, 1e-9)},
    "moe": {
        "launch": (20 * US, 1 * US, 400 * US), "bandwidth": (0.8, 0.05, 1.0), "compute": (0.5, 0.02, 1.0),
        "expert_padding": (20.0, 0.01, 300.0), "passes": (3.0, 0.01, 60.0), "sharpness": (3.0, 1.0, 12.0),
    },
}  # fmt: skip
QUANTISING: Bounds = {"row_seconds": (3e-9, 1e-11, 3e-7), "quantise_bandwidth": (0.4, 0.02, 1.0)}
SKEW: Bounds = {"popularity": (0.8, 0.1, 3.0)}  # Zipf exponent per unit of the table's own exponent
# Latent attention: few heads do not fill the matrix units, many are bound by them.
LATENT: Bounds = {"compute": (0.6, 0.03, 1.0)}
PACKED: Bounds = {"packed": (32.0, 8.0, 128.0)}  # rows that kernels of latent attention have in a tile
# Kernels that expand 8-bit K and V before their products; the search begins where this binds, else nothing moves it.
WIDE: Bounds = {"wide": (0.3e-9, 0.001e-9, 2e-9)}
# Of each family of algorithms. NCCL's all-reduces take longer to begin than the engines' own; where a search begins
# decides which algorithm it believes a size to run, and which of two protocols, so that it begins more than once.
SLOW_START = {"ring_all_reduce": 40 * US, "nvls_all_reduce": 7 * US}
OTHER_STARTS = (
    {"ring_all_reduce.launch": 8 * US, "nvls_all_reduce.launch": 20 * US},
    {"ring_all_reduce.launch": 15 * US, "nvls_all_reduce.bandwidth": 0.4, "custom_all_reduce.bandwidth": 0.4},
    {f"{family}.{name}": value for family in ("all_gather", "reduce_scatter", "all_to_all")
     for name, value in (("handshake", 12 * US), ("handshake_bytes", 3e6))},
)  # fmt: skip
# Where few tiles and a long k both make SMs wait, a search finds one of the two and keeps to it.
OTHER_STARTS_PRODUCTS = (
    {"idle": 0.9, "idle_depth": 2e3, "edge": 100.0, "ramp_sharpness": 3.0},
    {"idle": 0.1, "edge": 10.0, "ramp": 20 * US, "ramp_depth": 1e4, "tail": 0.01, "throttle": 0.4},
)
COLLECTIVE: Bounds = {
    "launch": (5 * US, 0.5 * US, 100 * US), "hop": (1 * US, 0.01 * US, 20 * US), "bandwidth": (0.75, 0.02, 1.0),
    # A GPU touches its own part at most once per pass, so that larger groups never take less time.
    "own": (0.3, 0.01, 1.0), "crossing": (0.2, 0.001, 3.0), "peer": (0.1 * US, 0.001 * US, 3 * US),
    "line": (0.5 * US, 0.001 * US, 10 * US), "line_bytes": (3e3, 30.0, 1e6),
    "handshake": (4 * US, 0.01 * US, 100 * US), "handshake_bytes": (3e5, 1e3, 3e8),
}  # fmt: skip
HOST: Bounds = {"host": (60 * US, 5 * US, 400 * US)}  # eager launches that outlast small kernels: a floor, not a cost
# Launches of vLLM's block-scaled products: how much shorter they are below 32 rows, what padding rows to four adds.
HOST_PRODUCTS: Bounds = {"host_few": (0.8, 0.2, 1.5), "host_padding": (20 * US, 0.01 * US, 400 * US)}
# Products cycle through several matrices, so that a small part of the cache is what each has, and is lost at once.
RESIDENT_PRODUCTS: Bounds = {"gain": (1.0, 0.01, 20.0), "share": (0.1, 0.02, 2.0)}
NUISANCE = frozenset({*RESIDENT, *SKEW, *HOST, *HOST_PRODUCTS})

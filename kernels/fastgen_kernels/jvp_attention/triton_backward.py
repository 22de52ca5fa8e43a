"""The gradient of the output in q, k and v (tangents play no part in it): three kernels without atomics, so two runs agree bit for bit.

With P = exp(S − lse), dP = dO·Vᵀ and Δ = rowsum(dO⊙O): dV = Pᵀ·dO, dS = P⊙(dP − Δ), dQ = scale·dS·K, dK = scale·dSᵀ·Q.
Letters as in triton_forward; heads that share keys are summed inside one program.
"""

# Types of kernel code are Triton's own.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from fastgen_kernels.jvp_attention.triton_forward import (
    LOG2E,
    NO_MASK,
    exponential,
    head_offset,
    load_tile,
    mask_scores,
    round_to,
    store_tile,
)

RUNTIME_INTEGERS = (
    *(f"{name}_s{axis}" for name in ("q", "k", "v", "o", "do", "dq", "dk", "dv") for axis in "bhn"),
    *("mask_sb", "mask_sh", "mask_sn", "num_heads", "groups", "num_queries", "num_keys"),
)


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def delta_kernel(
    o_ptr,
    residual_ptr,
    do_ptr,
    delta_ptr,
    o_sb,
    o_sh,
    o_sn,
    do_sb,
    do_sh,
    do_sn,
    num_heads,
    num_queries,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """delta: (B, H, Nq), the row sums of dO⊙O in fp32, O as it was before it was rounded. residual has o's strides."""
    num_tiles = tl.cdiv(num_queries, BLOCK_M)
    batch = tl.program_id(0) // num_tiles // num_heads
    head = tl.program_id(0) // num_tiles % num_heads
    rows_M = tl.program_id(0) % num_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    o_offset = head_offset(batch, head, o_sb, o_sh, UNIT)
    o_MD = load_tile(o_ptr + o_offset, rows_M, num_queries, o_sn, D, BLOCK_D, UNIT, True)
    if HAS_RESIDUAL:
        o_MD += load_tile(residual_ptr + o_offset, rows_M, num_queries, o_sn, D, BLOCK_D, UNIT, True)
    do_MD = load_tile(do_ptr + head_offset(batch, head, do_sb, do_sh, UNIT), rows_M, num_queries, do_sn, D, BLOCK_D, UNIT, True)
    delta_base = delta_ptr + (batch.to(tl.int64) * num_heads + head) * num_queries
    tl.store(delta_base + rows_M, tl.sum(o_MD * do_MD, 1), mask=rows_M < num_queries)


@triton.jit
def _row_constants(lse_ptr, delta_ptr, batch, head, num_heads, rows, num_queries, BIAS: tl.constexpr):
    """(lse in the scores' units, delta) of the rows; a row that sees no key, or is none, gets lse = inf and so probabilities 0."""
    offset = (batch.to(tl.int64) * num_heads + head) * num_queries
    lse = tl.load(lse_ptr + offset + rows, mask=rows < num_queries, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    if not BIAS:
        lse *= LOG2E
    return lse, tl.load(delta_ptr + offset + rows, mask=rows < num_queries, other=0.0)


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    do_ptr,
    centre_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    q_sb,
    q_sh,
    q_sn,
    k_sb,
    k_sh,
    k_sn,
    v_sb,
    v_sh,
    v_sn,
    do_sb,
    do_sh,
    do_sn,
    dq_sb,
    dq_sh,
    dq_sn,
    mask_sb,
    mask_sh,
    mask_sn,
    mask_sk,
    num_heads,
    groups,
    num_queries,
    num_keys,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNIT: tl.constexpr,
    MASK: tl.constexpr,
    BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_CENTRE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """dQ of one tile of BLOCK_M queries of one head. centre: (B, Hkv, D), a mean of the keys."""
    num_tiles = tl.cdiv(num_queries, BLOCK_M)
    tile = tl.program_id(0) % num_tiles
    batch = tl.program_id(0) // num_tiles // num_heads
    head = tl.program_id(0) // num_tiles % num_heads
    kv_head = head // groups
    rows_M = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty

    q_MD = load_tile(q_ptr + head_offset(batch, head, q_sb, q_sh, UNIT), rows_M, num_queries, q_sn, D, BLOCK_D, UNIT, UPCAST)
    do_MD = load_tile(do_ptr + head_offset(batch, head, do_sb, do_sh, UNIT), rows_M, num_queries, do_sn, D, BLOCK_D, UNIT, UPCAST)
    lse_M, delta_M = _row_constants(lse_ptr, delta_ptr, batch, head, num_heads, rows_M, num_queries, BIAS)
    k_base = k_ptr + head_offset(batch, kv_head, k_sb, k_sh, UNIT)
    v_base = v_ptr + head_offset(batch, kv_head, v_sb, v_sh, UNIT)
    mask_base = mask_ptr
    if MASK != NO_MASK:
        mask_base = mask_ptr + head_offset(batch, head, mask_sb, mask_sh, 1)

    dq_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    excess_M = tl.zeros([BLOCK_M], tl.float32)
    end = tl.minimum(num_keys, (tile + 1) * BLOCK_M) if CAUSAL else num_keys
    for start in tl.range(0, end, BLOCK_N):
        columns_N = start + tl.arange(0, BLOCK_N)
        k_ND = load_tile(k_base, columns_N, num_keys, k_sn, D, BLOCK_D, UNIT, UPCAST)
        v_ND = load_tile(v_base, columns_N, num_keys, v_sn, D, BLOCK_D, UNIT, UPCAST)
        s_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee")
        s_MN = mask_scores(
            s_MN, rows_M[:, None], columns_N[None, :], num_queries, num_keys, scale, mask_base, mask_sn, mask_sk, MASK, BIAS, CAUSAL, True
        )
        p_MN = exponential(s_MN - lse_M[:, None], BIAS)
        dp_MN = tl.dot(do_MD, tl.trans(v_ND), input_precision="ieee")
        ds_MN = round_to(p_MN * (dp_MN - delta_M[:, None]), DTYPE, UPCAST)
        dq_MD = tl.dot(ds_MN, k_ND, dq_MD, input_precision="ieee")
        if HAS_CENTRE:
            excess_M += tl.sum(ds_MN.to(tl.float32), 1)
    if HAS_CENTRE:
        # Rows of dS sum to 0, but for rounding: what is left would count as many times as the keys have in common.
        columns_D = tl.arange(0, BLOCK_D)
        centre_base = centre_ptr + (batch.to(tl.int64) * (num_heads // groups) + kv_head) * D
        centre_D = tl.load(centre_base + columns_D, mask=columns_D < D, other=0.0)
        dq_MD -= excess_M[:, None] * centre_D[None, :]
    store_tile(dq_ptr + head_offset(batch, head, dq_sb, dq_sh, UNIT), rows_M, num_queries, dq_sn, dq_MD * scale, D, BLOCK_D, UNIT, UPCAST)


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    q_sb,
    q_sh,
    q_sn,
    k_sb,
    k_sh,
    k_sn,
    v_sb,
    v_sh,
    v_sn,
    do_sb,
    do_sh,
    do_sn,
    dk_sb,
    dk_sh,
    dk_sn,
    dv_sb,
    dv_sh,
    dv_sn,
    mask_sb,
    mask_sh,
    mask_sn,
    mask_sk,
    num_heads,
    groups,
    num_queries,
    num_keys,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNIT: tl.constexpr,
    MASK: tl.constexpr,
    BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """dK and dV of one tile of BLOCK_N keys of one key/value head; scores are held turned, (N, M)."""
    num_tiles = tl.cdiv(num_keys, BLOCK_N)
    tile = tl.program_id(0) % num_tiles
    num_kv_heads = num_heads // groups
    batch = tl.program_id(0) // num_tiles // num_kv_heads
    kv_head = tl.program_id(0) // num_tiles % num_kv_heads
    columns_N = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty

    k_ND = load_tile(k_ptr + head_offset(batch, kv_head, k_sb, k_sh, UNIT), columns_N, num_keys, k_sn, D, BLOCK_D, UNIT, UPCAST)
    v_ND = load_tile(v_ptr + head_offset(batch, kv_head, v_sb, v_sh, UNIT), columns_N, num_keys, v_sn, D, BLOCK_D, UNIT, UPCAST)
    dk_ND = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_ND = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    first = tile * BLOCK_N // BLOCK_M * BLOCK_M if CAUSAL else 0
    for member in tl.range(0, groups):
        head = kv_head * groups + member
        q_base = q_ptr + head_offset(batch, head, q_sb, q_sh, UNIT)
        do_base = do_ptr + head_offset(batch, head, do_sb, do_sh, UNIT)
        mask_base = mask_ptr
        if MASK != NO_MASK:
            mask_base = mask_ptr + head_offset(batch, head, mask_sb, mask_sh, 1)
        for start in tl.range(first, num_queries, BLOCK_M):
            rows_M = start + tl.arange(0, BLOCK_M)
            q_MD = load_tile(q_base, rows_M, num_queries, q_sn, D, BLOCK_D, UNIT, UPCAST)
            do_MD = load_tile(do_base, rows_M, num_queries, do_sn, D, BLOCK_D, UNIT, UPCAST)
            lse_M, delta_M = _row_constants(lse_ptr, delta_ptr, batch, head, num_heads, rows_M, num_queries, BIAS)
            s_NM = tl.dot(k_ND, tl.trans(q_MD), input_precision="ieee")
            s_NM = mask_scores(
                s_NM, rows_M[None, :], columns_N[:, None], num_queries, num_keys, scale, mask_base, mask_sn, mask_sk, MASK, BIAS, CAUSAL, True
            )
            p_NM = exponential(s_NM - lse_M[None, :], BIAS)
            dv_ND = tl.dot(round_to(p_NM, DTYPE, UPCAST), do_MD, dv_ND, input_precision="ieee")
            dp_NM = tl.dot(v_ND, tl.trans(do_MD), input_precision="ieee")
            ds_NM = round_to(p_NM * (dp_NM - delta_M[None, :]), DTYPE, UPCAST)
            dk_ND = tl.dot(ds_NM, q_MD, dk_ND, input_precision="ieee")
    store_tile(dk_ptr + head_offset(batch, kv_head, dk_sb, dk_sh, UNIT), columns_N, num_keys, dk_sn, dk_ND * scale, D, BLOCK_D, UNIT, UPCAST)
    store_tile(dv_ptr + head_offset(batch, kv_head, dv_sb, dv_sh, UNIT), columns_N, num_keys, dv_sn, dv_ND, D, BLOCK_D, UNIT, UPCAST)

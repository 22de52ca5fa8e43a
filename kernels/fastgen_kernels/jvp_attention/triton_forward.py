"""The forward kernel: output, tangent and log-normaliser in one pass over the keys.

Letters: B batch, H query heads, M queries of this program, N keys of one step, D head size padded to a power of two.
Formulas and the reasons for rounding and centring are in README.md.
"""

# Types of kernel code are Triton's own.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Which masks there are: one row for all queries of a head (loaded once for a whole tile), or one for each. BIAS: added, else 0 = hidden.
NO_MASK = tl.constexpr(0)
KEY_MASK = tl.constexpr(1)
FULL_MASK = tl.constexpr(2)


@triton.jit
def load_tile(base, rows, num_rows, stride, D: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr, UPCAST: tl.constexpr):
    """(rows, BLOCK_D) of a tensor whose last stride is 1; zero outside. `stride` counts UNIT elements. UPCAST: as fp32."""
    columns = tl.arange(0, BLOCK_D)
    pointers = base + rows.to(tl.int64)[:, None] * (stride * UNIT) + columns[None, :]
    tile = tl.load(pointers, mask=(rows[:, None] < num_rows) & (columns[None, :] < D), other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def round_to(x, dtype: tl.constexpr, UPCAST: tl.constexpr):
    """fp32 values as they enter a matrix product: rounded to the inputs' dtype.

    UPCAST keeps bf16 values in fp32, for the interpreter only: its bf16 products work on bit patterns, and its conversion truncates.
    """
    if UPCAST:
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits & -0x10000).to(tl.float32, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def store_tile(base, rows, num_rows, stride, tile, D: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr, UPCAST: tl.constexpr):
    """The inverse of load_tile, rounding fp32 values to the tensor's dtype."""
    columns = tl.arange(0, BLOCK_D)
    pointers = base + rows.to(tl.int64)[:, None] * (stride * UNIT) + columns[None, :]
    tile = round_to(tile, base.dtype.element_ty, UPCAST).to(base.dtype.element_ty)
    tl.store(pointers, tile, mask=(rows[:, None] < num_rows) & (columns[None, :] < D))


@triton.jit
def head_offset(batch, head, stride_b, stride_h, UNIT: tl.constexpr):
    """Elements from a tensor's start to its (batch, head); 64-bit."""
    return (batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h) * UNIT


@triton.jit
def mask_scores(
    products,
    rows,
    columns,
    num_queries,
    num_keys,
    scale,
    mask_base,
    mask_sn,
    mask_sk,
    MASK: tl.constexpr,
    BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Scores from raw products, −inf where a query may not see a key. rows and columns broadcast to the products: (M, 1) and (1, N), or turned.

    Scores are in units of log2 (one multiply-add an exponential), with BIAS natural, since a bias of finfo.min must not overflow.
    EDGE: the step may reach past the last key or past the causal diagonal.
    """
    s = products * (scale if BIAS else scale * LOG2E)
    inside = columns < num_keys
    if MASK != NO_MASK:
        pointers = mask_base + columns.to(tl.int64) * mask_sk
        if MASK == FULL_MASK:
            pointers = pointers + rows.to(tl.int64) * mask_sn
            inside = inside & (rows < num_queries)
        if BIAS:
            s += tl.load(pointers, mask=inside, other=float("-inf")).to(tl.float32)
        else:
            s = tl.where(tl.load(pointers, mask=inside, other=0) != 0, s, float("-inf"))
    elif EDGE:
        s = tl.where(inside, s, float("-inf"))
    if CAUSAL and EDGE:
        s = tl.where(columns <= rows, s, float("-inf"))
    return s


@triton.jit
def exponential(x, BIAS: tl.constexpr):
    """exp of differences of scores, in the scores' units."""
    return tl.exp2(x * LOG2E if BIAS else x)


@triton.jit
def _advance(
    state,
    q_MD,
    tq_MD,
    bases,
    strides,
    rows_M,
    first,
    last,
    num_queries,
    num_keys,
    scale,
    mask_base,
    mask_sn,
    mask_sk,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNIT: tl.constexpr,
    MASK: tl.constexpr,
    BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_TQ: tl.constexpr,
    HAS_TK: tl.constexpr,
    HAS_TV: tl.constexpr,
    UPCAST: tl.constexpr,
    EDGE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The running sums after the keys first…last. state: m, l, l_exact, mu, kappa: (M,); O, G: (M, D)."""
    m_M, l_M, exact_M, mu_M, kappa_M, o_MD, g_MD = state
    k_base, v_base, tk_base, tv_base = bases
    k_sn, v_sn, tk_sn, tv_sn = strides
    for start in tl.range(first, last, BLOCK_N):
        columns_N = start + tl.arange(0, BLOCK_N)
        k_ND = load_tile(k_base, columns_N, num_keys, k_sn, D, BLOCK_D, UNIT, UPCAST)
        s_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee")
        ts_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if HAS_TQ:
            ts_MN = tl.dot(tq_MD, tl.trans(k_ND), ts_MN, input_precision="ieee")
        if HAS_TK:
            tk_ND = load_tile(tk_base, columns_N, num_keys, tk_sn, D, BLOCK_D, UNIT, UPCAST)
            ts_MN = tl.dot(q_MD, tl.trans(tk_ND), ts_MN, input_precision="ieee")
        s_MN = mask_scores(
            s_MN, rows_M[:, None], columns_N[None, :], num_queries, num_keys, scale, mask_base, mask_sn, mask_sk, MASK, BIAS, CAUSAL, EDGE
        )

        new_m_M = tl.maximum(m_M, tl.max(s_MN, 1))
        # A row that has seen no key yet: −inf − (−inf) would be NaN. Without a mask the first step always shows key 0.
        safe_m_M = new_m_M if MASK == NO_MASK else tl.where(new_m_M == float("-inf"), 0.0, new_m_M)
        decay_M = exponential(m_M - safe_m_M, BIAS)
        p_MN = exponential(s_MN - safe_m_M[:, None], BIAS)
        sum_M = tl.sum(p_MN, 1)
        rounded_p_MN = round_to(p_MN, DTYPE, UPCAST)
        v_ND = load_tile(v_base, columns_N, num_keys, v_sn, D, BLOCK_D, UNIT, UPCAST)
        exact_M = exact_M * decay_M + sum_M
        l_M = l_M * decay_M + tl.sum(rounded_p_MN.to(tl.float32), 1)
        o_MD = tl.dot(rounded_p_MN, v_ND, o_MD * decay_M[:, None], input_precision="ieee")

        g_MD *= decay_M[:, None]
        if HAS_TQ or HAS_TK:
            weighted_MN = p_MN * (ts_MN * scale)
            # The centre of a row's tangent scores: their mean over the first keys that it sees.
            centre_M = tl.sum(weighted_MN, 1) / (sum_M if MASK == NO_MASK else tl.where(sum_M == 0.0, 1.0, sum_M))
            kappa_M = tl.where(m_M == float("-inf"), centre_M, kappa_M)
            h_MN = round_to(weighted_MN - kappa_M[:, None] * p_MN, DTYPE, UPCAST)
            mu_M = mu_M * decay_M + tl.sum(h_MN.to(tl.float32), 1)
            g_MD = tl.dot(h_MN, v_ND, g_MD, input_precision="ieee")
        if HAS_TV:
            tv_ND = load_tile(tv_base, columns_N, num_keys, tv_sn, D, BLOCK_D, UNIT, UPCAST)
            g_MD = tl.dot(rounded_p_MN, tv_ND, g_MD, input_precision="ieee")
        m_M = new_m_M
    return m_M, l_M, exact_M, mu_M, kappa_M, o_MD, g_MD


RUNTIME_INTEGERS = (
    *(f"{name}_s{axis}" for name in ("q", "k", "v", "tq", "tk", "tv", "o") for axis in "bhn"),
    *("mask_sb", "mask_sh", "mask_sn", "num_heads", "groups", "num_queries", "num_keys"),
)


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    tq_ptr,
    tk_ptr,
    tv_ptr,
    mask_ptr,
    o_ptr,
    to_ptr,
    residual_ptr,
    lse_ptr,
    q_sb,
    q_sh,
    q_sn,
    k_sb,
    k_sh,
    k_sn,
    v_sb,
    v_sh,
    v_sn,
    tq_sb,
    tq_sh,
    tq_sn,
    tk_sb,
    tk_sh,
    tk_sn,
    tv_sb,
    tv_sh,
    tv_sn,
    o_sb,
    o_sh,
    o_sn,
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
    HAS_TQ: tl.constexpr,
    HAS_TK: tl.constexpr,
    HAS_TV: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of BLOCK_M queries of one head. Strides of q…o count UNIT elements, the mask's single ones; to and residual have o's strides."""
    num_tiles = tl.cdiv(num_queries, BLOCK_M)
    tile = tl.program_id(0) % num_tiles
    if CAUSAL:
        # The last tiles see the most keys: start them first.
        tile = num_tiles - 1 - tile
    batch = tl.program_id(0) // num_tiles // num_heads
    head = tl.program_id(0) // num_tiles % num_heads
    kv_head = head // groups
    rows_M = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty

    q_MD = load_tile(q_ptr + head_offset(batch, head, q_sb, q_sh, UNIT), rows_M, num_queries, q_sn, D, BLOCK_D, UNIT, UPCAST)
    tq_MD = q_MD
    if HAS_TQ:
        tq_MD = load_tile(tq_ptr + head_offset(batch, head, tq_sb, tq_sh, UNIT), rows_M, num_queries, tq_sn, D, BLOCK_D, UNIT, UPCAST)
    k_base = k_ptr + head_offset(batch, kv_head, k_sb, k_sh, UNIT)
    v_base = v_ptr + head_offset(batch, kv_head, v_sb, v_sh, UNIT)
    tk_base = k_base
    if HAS_TK:
        tk_base = tk_ptr + head_offset(batch, kv_head, tk_sb, tk_sh, UNIT)
    tv_base = v_base
    if HAS_TV:
        tv_base = tv_ptr + head_offset(batch, kv_head, tv_sb, tv_sh, UNIT)
    mask_base = mask_ptr
    if MASK != NO_MASK:
        mask_base = mask_ptr + head_offset(batch, head, mask_sb, mask_sh, 1)

    zero_M = tl.zeros([BLOCK_M], tl.float32)
    zero_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    state = (zero_M - float("inf"), zero_M, zero_M, zero_M, zero_M, zero_MD, zero_MD)
    end = num_keys
    whole = num_keys // BLOCK_N * BLOCK_N
    if CAUSAL:
        end = tl.minimum(num_keys, (tile + 1) * BLOCK_M)
        whole = tl.minimum(num_keys, tile * BLOCK_M + 1) // BLOCK_N * BLOCK_N
    bases = (k_base, v_base, tk_base, tv_base)
    strides = (k_sn, v_sn, tk_sn, tv_sn)
    for part in tl.static_range(2):
        state = _advance(
            state,
            q_MD,
            tq_MD,
            bases,
            strides,
            rows_M,
            0 if part == 0 else whole,
            whole if part == 0 else end,
            num_queries,
            num_keys,
            scale,
            mask_base,
            mask_sn,
            mask_sk,
            D,
            BLOCK_D,
            BLOCK_M,
            BLOCK_N,
            UNIT,
            MASK,
            BIAS,
            CAUSAL,
            HAS_TQ,
            HAS_TK,
            HAS_TV,
            UPCAST,
            part == 1,
            DTYPE,
        )
    m_M, l_M, exact_M, mu_M, _, o_MD, g_MD = state

    l_M = tl.where(l_M == 0.0, 1.0, l_M)
    o_MD = o_MD / l_M[:, None]
    o_offset = head_offset(batch, head, o_sb, o_sh, UNIT)
    store_tile(o_ptr + o_offset, rows_M, num_queries, o_sn, o_MD, D, BLOCK_D, UNIT, UPCAST)
    if HAS_RESIDUAL:
        lost_MD = o_MD - round_to(o_MD, DTYPE, UPCAST).to(tl.float32)
        store_tile(residual_ptr + o_offset, rows_M, num_queries, o_sn, lost_MD, D, BLOCK_D, UNIT, UPCAST)
    if HAS_TQ or HAS_TK or HAS_TV:
        to_MD = (g_MD - mu_M[:, None] * o_MD) / l_M[:, None]
        store_tile(to_ptr + o_offset, rows_M, num_queries, o_sn, to_MD, D, BLOCK_D, UNIT, UPCAST)
    lse_M = m_M * (1.0 if BIAS else LN2) + tl.log(exact_M)
    lse_base = lse_ptr + (batch.to(tl.int64) * num_heads + head) * num_queries
    tl.store(lse_base + rows_M, lse_M, mask=rows_M < num_queries)

"""The three passes of the tiled loss as Triton kernels: rows (h / tau of all views) against tiles of +-1 codes.

    s_ik = rows_i . w_k                             logits, made tile by tile in float32 and never stored
    statistics    top_i = max_k s_ik,  total_i = sum_k exp(s_ik - top_i),  centers_i = sum_k exp(s_ik - top_i) w_k
    means         pbar_a[k] = mean_i exp(s_a[i,k] - lse_a[i])
    gradient      product_i = sum_k A_ik w_k,  mass_i = sum_k A_ik

    R rows (of all views asked for), B images, F head width, K codes, S shares of the codes, G global views

Who computes what:

    statistics    a program holds a block of rows and passes over one of S shares of the codes with an online maximum;
                  the S partial results are returned, S is chosen so that few rows still keep every multiprocessor busy
    means         a program holds a tile of codes of one view and passes over all images: no share, no atomics
    gradient      a program holds both global views of a block of images and passes over a share of the codes: each
                  code tile and each logit serves both views. Partial results per share are summed by torch.

A tile of codes arrives as bytes, bits or a seed, becomes +-1 in registers, and goes to the tensor cores through shared
memory. While F <= WHOLE_F the rows stay in shared memory, a tile of codes is decoded once for both products, and a
program owns all F columns of its output. Beyond that rows are read in steps too, and programs split the columns of the
output, each computing the logits anew; so does the gradient with local views, whose rows would not fit.

Sums over shares run in a fixed order: results are the same bits at every call on one device.

The shapes were chosen by compiling for sm_80 (A100) and sm_90 (H100) with Triton 3.6 and 3.8 and reading what ptxas
says: tensor-core instructions, no spilled registers, shared memory that fits (tests/test_triton_kernels.py). Sizes that
tiles do not divide spill some tens of bytes a thread. They ran on one H200 (benchmarks/README.md); on a CPU they run in
Triton's interpreter (TRITON_INTERPRET=1), where only float32 is right. `make gpu` tests and times them on a GPU.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dictionary import HASH_OFFSET, STORAGES

NUM_GLOBAL = 2  # global views that one gradient program holds
WHOLE_F = 384  # widest output of 128 rows whose float32 sums fit the registers of 256 threads
INTERPRETED_SHARES = 3  # where there are no multiprocessors to keep busy


class Shape(NamedTuple):
    """A program's tile. In `gradient` half of the rows belong to each view."""

    rows: int
    codes: int  # a multiple of 32
    step: int  # of F, in one matrix product
    columns: int  # of the output in one program, at most; 0: all F, and rows and codes stay in shared memory
    warps: int
    stages: int  # of software pipelining


# (kernel, mode, architecture), and a storage where it needs its own. whole: F <= WHOLE_F; split: wider; local: with
# local views. means always reads rows in steps.
SHAPES = {
    ("statistics", "whole", "sm_80"): Shape(128, 32, 64, 0, 8, 2),
    ("statistics", "whole", "sm_90"): Shape(128, 64, 64, 0, 8, 2),
    ("statistics", "split", "sm_80"): Shape(128, 32, 64, 256, 8, 3),
    ("statistics", "split", "sm_90"): Shape(128, 64, 64, 256, 8, 3),
    ("statistics", "whole", "sm_80", "seed"): Shape(128, 32, 64, 192, 8, 3),  # hashing takes registers
    ("means", "split", "sm_80"): Shape(128, 64, 64, 0, 8, 3),
    ("means", "split", "sm_90"): Shape(128, 64, 64, 0, 8, 3),
    ("gradient", "whole", "sm_80"): Shape(128, 32, 64, 0, 8, 2),
    ("gradient", "whole", "sm_90"): Shape(128, 32, 64, 0, 8, 3),
    ("gradient", "split", "sm_80"): Shape(128, 32, 64, 256, 8, 3),
    ("gradient", "split", "sm_90"): Shape(128, 64, 64, 256, 8, 3),
    ("gradient", "local", "sm_80"): Shape(128, 32, 64, 192, 8, 3),
    ("gradient", "local", "sm_90"): Shape(128, 32, 64, 256, 8, 3),
}
if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8):  # found by compiling with 3.6
    SHAPES |= {
        ("statistics", "whole", "sm_80", "bits"): Shape(128, 32, 64, 192, 8, 3),
        ("statistics", "whole", "sm_90"): Shape(128, 32, 64, 0, 8, 2),
        ("statistics", "split", "sm_80", "seed"): Shape(128, 32, 64, 192, 8, 3),
        ("gradient", "whole", "sm_80", "bits"): Shape(128, 32, 64, 192, 8, 3),
        ("gradient", "whole", "sm_80", "seed"): Shape(128, 32, 64, 192, 8, 3),
        ("gradient", "whole", "sm_90"): Shape(64, 32, 64, 0, 8, 3),
        ("gradient", "split", "sm_90"): Shape(128, 32, 64, 256, 8, 3),
        ("gradient", "local", "sm_80"): Shape(128, 32, 64, 192, 8, 2),
        ("gradient", "local", "sm_90"): Shape(128, 32, 64, 256, 8, 2),
    }
SMALL_SHAPE = Shape(32, 32, 32, 32, 4, 2)  # float32, which has no tensor cores, and GPUs with less shared memory
SHARED_MEMORY = 163 * 1024  # bytes a block may have on sm_80; less: SMALL_SHAPE


class TritonKernels:
    """Both passes of `fused_loss` over a dictionary, an engine with the methods and the results of `tiles.Tiles`.

    codes: a `Dictionary` on a GPU.  compute_dtype: of the matrix products, float32 or bfloat16.
    """

    def __init__(self, codes, compute_dtype):
        if compute_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"compute_dtype is {compute_dtype}; the Triton kernels expect float32 or bfloat16")
        self.codes, self.dtype = codes, compute_dtype

    def round(self, rows):
        return rows.to(self.dtype).to(rows.dtype)

    def statistics(self, rows):
        """What `Tiles.statistics` returns, with None in place of the highest logits' codes."""
        tops, totals, centers = statistics(rows.to(self.dtype).contiguous(), self.codes)
        top = tops.amax(dim=0)
        scale = (tops - top).exp()
        return top, (totals * scale).sum(dim=0), torch.einsum("sr,srf->rf", scale, centers), None

    def gradient(self, rows, top, total, slope=None, agreement=0.0, offset=None, local=None):
        """What `Tiles.gradient` returns. Raises ValueError for other than two global views."""
        lse = (top + total.log()).flatten()
        rows_of_all = rows.to(self.dtype).flatten(0, 1).contiguous()
        mean = means(rows_of_all, self.codes, lse, len(rows))
        if slope is None:
            return mean, None, None
        slope = (slope(mean) if callable(slope) else slope).contiguous()
        local = None if local is None else local.to(self.dtype).contiguous()
        offset = (torch.zeros_like(top) if offset is None else offset).flatten()
        product, mass = gradient(rows_of_all, local, self.codes, lse, offset, slope, agreement, len(rows))
        return mean, product.view(rows.shape), mass.view(top.shape)


def statistics(rows, codes, shares=None, shape=None):
    """Per share of the codes: top (S, R), total (S, R) and centers (S, R, F), float32 (formulas above).

    rows: (R, F) bfloat16 or float32, contiguous.  codes: a dictionary with `shape` (F, K), `storage`, `data`, `seed`
    and `first`, the global index of its first code, a multiple of 32.
    shares: at most how many shares; None: as many as keep the device busy.  shape: a `Shape` in place of the tuned one.
    Raises ValueError for tensors that do not fit.
    """
    _check(codes, rows=rows)
    num_rows, dim = rows.shape
    shape = shape or _shape_on(rows.device, "statistics", rows.dtype, codes)
    blocks, splits = triton.cdiv(num_rows, shape.rows), _split_columns(dim, shape)[1]
    num_shares, tiles_per_share = _split_codes(codes.shape[1], shape, blocks * splits, rows.device, shares)
    top, total = rows.new_empty(2, num_shares, num_rows, dtype=torch.float32)
    centers = rows.new_empty(num_shares, num_rows, dim, dtype=torch.float32)
    _statistics_kernel[(blocks, num_shares, splits)](
        rows, _data(codes, shape), top, total, centers, num_rows, *_scalars(codes), tiles_per_share,
        **_constants(codes, shape),
    )  # fmt: skip
    return top, total, centers


def means(rows, codes, lse, num_views, shape=None):
    """Mean over the images of each of `num_views` views of exp(s - lse): (num_views, K) float32.

    rows: (num_views * B, F) and lse: (num_views * B,) float32, view after view. `statistics` tells the other arguments.
    """
    _check(codes, rows=rows, lse=lse)
    if len(rows) % num_views or lse.shape != rows.shape[:1]:
        raise ValueError(f"rows has {len(rows)} rows, lse {tuple(lse.shape)}; expected {num_views} views of B rows")
    shape = shape or _shape_on(rows.device, "means", rows.dtype, codes)
    num_codes = codes.shape[1]
    out = rows.new_empty(num_views, num_codes, dtype=torch.float32)
    _means_kernel[(triton.cdiv(num_codes, shape.codes), num_views)](
        rows, _data(codes, shape), lse, out, len(rows) // num_views, *_scalars(codes), **_constants(codes, shape)
    )
    return out


def gradient(rows, local, codes, lse, offset, slope, agreement, num_global=NUM_GLOBAL, shares=None, shape=None):
    """Sums over codes for the targets' gradient: product (2B, F) = sum_k A w_k and mass (2B,) = sum_k A, float32, with

        A[a,i,k] = exp(s_a[i,k] - lse_a[i]) * (slope[a,k] - agreement * (s_other[i,k] + local_i . w_k) - offset[a,i])

    rows: (2B, F), the two global views.  local: (B, F), h / tau summed over local views, or None.  lse, offset: (2B,)
    float32.  slope: (2, K) float32.  agreement: float.  `statistics` tells the others.
    mass sums A as rounded to the rows' dtype, as product does, so that product - mass m cancels where it should.
    Raises ValueError also for a number of global views other than 2.
    """
    if num_global != NUM_GLOBAL:
        raise ValueError(f"num_global is {num_global}; the Triton kernels expect exactly {NUM_GLOBAL} global views")
    _check(codes, rows=rows, lse=lse, offset=offset, slope=slope, **({} if local is None else {"local": local}))
    _check_gradient_shapes(rows, local, codes, lse, offset, slope)
    num_images, dim = len(rows) // 2, rows.shape[1]
    shape = shape or _shape_on(rows.device, "gradient", rows.dtype, codes, local is not None)
    blocks, splits = triton.cdiv(num_images, shape.rows // 2), _split_columns(dim, shape)[1]
    num_shares, tiles_per_share = _split_codes(codes.shape[1], shape, blocks * splits, rows.device, shares)
    product = rows.new_empty(num_shares, len(rows), dim, dtype=torch.float32)
    mass = rows.new_empty(num_shares, len(rows), dtype=torch.float32)
    _gradient_kernel[(blocks, num_shares, splits)](
        rows, rows if local is None else local, _data(codes, shape), lse, offset, slope, product, mass, num_images,
        *_scalars(codes), tiles_per_share, float(agreement), HAS_LOCAL=local is not None, **_constants(codes, shape),
    )  # fmt: skip
    return product.sum(dim=0), mass.sum(dim=0)


# ---- launches --------------------------------------------------------------------------------------------------------


def _check(codes, **tensors):
    rows = tensors["rows"]
    if rows.dtype not in (torch.float32, torch.bfloat16) or rows.ndim != 2 or rows.shape[1] != codes.shape[0]:
        raise ValueError(f"rows is {tuple(rows.shape)} {rows.dtype}, codes {tuple(codes.shape)}; "
                         "expected (R, F) float32 or bfloat16, and (F, K)")  # fmt: skip
    if codes.storage not in STORAGES or codes.first % 32:
        raise ValueError(f"codes stored as {codes.storage!r} from {codes.first}; expected {STORAGES}, a multiple of 32")
    if codes.data is not None and codes.data.dtype != (torch.int8 if codes.storage == "int8" else torch.int32):
        raise ValueError(f"codes stored as {codes.storage!r} in {codes.data.dtype}; expected int8 codes or int32 words")
    if rows.numel() >= 2**31:
        raise ValueError(f"rows has {rows.numel()} entries; offsets into it are 32 bits")
    if codes.data is not None:
        tensors["codes"] = codes.data
    for name, tensor in tensors.items():
        if not tensor.is_contiguous() or tensor.device != rows.device:
            raise ValueError(f"{name} is on {tensor.device} with strides {tensor.stride()}; "
                             f"expected a contiguous tensor on {rows.device}")  # fmt: skip
        if name not in ("rows", "local", "codes") and tensor.dtype != torch.float32:
            raise ValueError(f"{name} is {tensor.dtype}; expected float32")


def _check_gradient_shapes(rows, local, codes, lse, offset, slope):
    num_rows, dim = rows.shape
    expected = {"lse": (num_rows,), "offset": (num_rows,), "slope": (NUM_GLOBAL, codes.shape[1])}
    got = {"lse": tuple(lse.shape), "offset": tuple(offset.shape), "slope": tuple(slope.shape)}
    if local is not None:
        expected["local"] = (num_rows // 2, dim, rows.dtype)
        got["local"] = (*local.shape, local.dtype)
    if num_rows % 2 or got != expected:
        raise ValueError(f"for rows {tuple(rows.shape)} of two views got {got}; expected {expected}")


def _shape_on(device, kernel, rows_dtype, codes, has_local=False):
    if rows_dtype == torch.float32 or device.type != "cuda":
        return SMALL_SHAPE
    properties = torch.cuda.get_device_properties(device)
    if properties.shared_memory_per_block_optin < SHARED_MEMORY:
        return SMALL_SHAPE
    architecture = "sm_90" if properties.major == 9 else "sm_80"
    return tuned_shape(kernel, codes.shape[0], has_local, architecture, codes.storage)


def tuned_shape(kernel, dim, has_local, architecture, storage):
    mode = "local" if has_local else "whole" if dim <= WHOLE_F else "split"
    key = kernel, "split" if kernel == "means" else mode, architecture
    return SHAPES.get((*key, storage)) or SHAPES[key]


def _split_columns(dim, shape):
    """(columns of F in a program, a multiple of the step; programs that they are split over)."""
    steps = triton.cdiv(dim, shape.step)
    fewest = triton.cdiv(dim, shape.columns) if shape.columns else 1
    splits = next((n for n in range(fewest, 2 * fewest) if steps % n == 0), fewest)  # equal parts need no masks
    columns = triton.cdiv(steps, splits) * shape.step
    return columns, triton.cdiv(dim, columns)


def _split_codes(num_codes, shape, programs, device, shares=None):
    """(number of shares, tiles of codes in a share): the split with which the last of all programs ends first."""
    tiles = triton.cdiv(num_codes, shape.codes)
    if shares is None and device.type != "cuda":
        shares = INTERPRETED_SHARES
    if shares is None:
        busy = torch.cuda.get_device_properties(device).multi_processor_count  # a program fills a multiprocessor
        limit = max(1, min(tiles, triton.cdiv(2 * busy, programs)))  # partial results cost memory
        shares = min(range(1, limit + 1), key=lambda n: triton.cdiv(programs * n, busy) * triton.cdiv(tiles, n))
    tiles_per_share = triton.cdiv(tiles, max(1, min(shares, tiles)))
    return triton.cdiv(tiles, tiles_per_share), tiles_per_share  # no share is empty


def _is_even(codes, shape):
    """Whether tiles end where the dictionary does; then kernels mask nothing and read int8 codes as words of four."""
    dim, num_codes = codes.shape
    return num_codes % shape.codes == 0 and dim % shape.step == 0 and dim % _split_columns(dim, shape)[0] == 0


def _data(codes, shape):
    return codes.data.view(torch.int32) if codes.storage == "int8" and _is_even(codes, shape) else codes.data


def _scalars(codes):
    """(K, the hash's seed as a signed 32-bit number, index of the dictionary's first word of 32 codes)."""
    seed = (codes.seed + HASH_OFFSET) % 2**32 if codes.storage == "seed" else 0
    return codes.shape[1], seed - 2**32 if seed >= 2**31 else seed, codes.first // 32


def _constants(codes, shape):
    dim, num_codes = codes.shape
    if num_codes * shape.step >= 2**31:
        raise ValueError(
            f"{num_codes} codes; offsets inside a tile are 32 bits: expected fewer than 2^31 / {shape.step}"
        )
    columns, _ = _split_columns(dim, shape)
    return {
        "F": dim, "COLUMNS": columns, "WHOLE": not shape.columns, "STORAGE": codes.storage,
        "ROWS": shape.rows, "CODES": shape.codes, "STEP": shape.step,
        "EVEN": _is_even(codes, shape),
        "num_warps": shape.warps, "num_stages": shape.stages,
    }  # fmt: skip


# ---- kernels ---------------------------------------------------------------------------------------------------------
#
# A tuple holds one tensor per step of F: blocks are powers of two, F need not be.
# disable_licm: what does not change from tile to tile is computed again; held in registers it would make others spill.

UNSPECIALISED = ["seed", "first_word", "tiles_per_share"]  # no new compilation for their values


@triton.jit(do_not_specialize=UNSPECIALISED)
def _statistics_kernel(
    rows, data, top_out, total_out, centers_out, num_rows, num_codes, seed, first_word, tiles_per_share,
    F: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr, STORAGE: tl.constexpr,
    ROWS: tl.constexpr, CODES: tl.constexpr, STEP: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = rows.dtype.element_ty
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    share = tl.program_id(1)
    column = tl.program_id(2) * COLUMNS
    row_start = tl.minimum(i, num_rows - 1) * F  # rows beyond the last repeat it, unstored
    h = _row_steps(rows, row_start, F, STEP, EVEN, WHOLE)
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    centers = _zeros(ROWS, COLUMNS, STEP)
    first_tile = share * tiles_per_share
    last_tile = tl.minimum(first_tile + tiles_per_share, tl.cdiv(num_codes, CODES))
    for tile in tl.range(first_tile, last_tile, disable_licm=True):
        k = tile * CODES
        s, w = _logits(
            rows, row_start, h, data, seed, first_word, k, num_codes, F, STORAGE, ROWS, STEP, CODES, EVEN, WHOLE
        )
        if not EVEN:
            s = tl.where((k + tl.arange(0, CODES) < num_codes)[None, :], s, -float("inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        e = tl.exp(s - new_top[:, None])
        shrink = tl.exp(top - new_top)
        top = new_top
        total = total * shrink + tl.sum(e, 1)
        centers = _scaled(centers, shrink)
        centers = _add_products(
            centers, e.to(dtype), w, data, seed, first_word, column, k, num_codes, F, STORAGE, STEP, CODES, EVEN, WHOLE
        )
    out = share.to(tl.int64) * num_rows + i
    if tl.program_id(2) == 0:
        tl.store(top_out + out, top, mask=i < num_rows)
        tl.store(total_out + out, total, mask=i < num_rows)
    _store_steps(centers_out + out * F, centers, i < num_rows, column, F, STEP)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _gradient_kernel(
    rows, local, data, lse, offset, slope, product_out, mass_out, num_images, num_codes, seed, first_word,
    tiles_per_share, agreement, HAS_LOCAL: tl.constexpr,
    F: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr, STORAGE: tl.constexpr,
    ROWS: tl.constexpr, CODES: tl.constexpr, STEP: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = rows.dtype.element_ty
    # 8 images of one view, those images of the other view, and so on: a thread of a matrix product holds rows r and
    # r + 8, so that an image's two logits meet in one thread
    r = tl.arange(0, ROWS)
    view = r // 8 % 2
    i = tl.program_id(0) * (ROWS // 2) + r // 16 * 8 + r % 8
    share = tl.program_id(1)
    column = tl.program_id(2) * COLUMNS
    image = tl.minimum(i, num_images - 1)  # images beyond the last repeat it, unstored
    row = view * num_images + image
    row_start = row * F
    local_start = image * F
    h = _row_steps(rows, row_start, F, STEP, EVEN, WHOLE)
    row_lse = tl.load(lse + row)
    row_offset = tl.load(offset + row)
    product = _zeros(ROWS, COLUMNS, STEP)
    mass = tl.zeros((ROWS,), tl.float32)
    first_tile = share * tiles_per_share
    last_tile = tl.minimum(first_tile + tiles_per_share, tl.cdiv(num_codes, CODES))
    for tile in tl.range(first_tile, last_tile, disable_licm=True):
        k = tile * CODES
        s, w = _logits(
            rows, row_start, h, data, seed, first_word, k, num_codes, F, STORAGE, ROWS, STEP, CODES, EVEN, WHOLE
        )
        predicted = s
        if HAS_LOCAL:
            predicted = _partial_logits(
                s, local, local_start, data, seed, first_word, k, num_codes, F, STORAGE, STEP, CODES, EVEN
            )
        first, second = _split_views(predicted, ROWS, CODES)
        first_slope = _load_slope(slope, k, num_codes, CODES, EVEN) - agreement * second
        second_slope = _load_slope(slope + num_codes, k, num_codes, CODES, EVEN) - agreement * first
        full_slope = _join_views(first_slope, second_slope, ROWS, CODES)
        weights = tl.exp(s - row_lse[:, None]) * (full_slope - row_offset[:, None])
        if not EVEN:
            weights = tl.where((k + tl.arange(0, CODES) < num_codes)[None, :], weights, 0.0)
        weights = weights.to(dtype)
        mass += tl.sum(weights.to(tl.float32), 1)
        product = _add_products(
            product, weights, w, data, seed, first_word, column, k, num_codes, F, STORAGE, STEP, CODES, EVEN, WHOLE
        )
    out = share.to(tl.int64) * (2 * num_images) + row
    if tl.program_id(2) == 0:
        tl.store(mass_out + out, mass, mask=i < num_images)
    _store_steps(product_out + out * F, product, i < num_images, column, F, STEP)


@triton.jit(do_not_specialize=UNSPECIALISED[:2])
def _means_kernel(
    rows, data, lse, means_out, num_images, num_codes, seed, first_word,
    F: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr, STORAGE: tl.constexpr,
    ROWS: tl.constexpr, CODES: tl.constexpr, STEP: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0) * CODES
    view = tl.program_id(1)
    total = tl.zeros((ROWS, CODES), tl.float32)  # one sum over rows at the end
    for block in range(tl.cdiv(num_images, ROWS)):
        i = block * ROWS + tl.arange(0, ROWS)
        row = view * num_images + tl.minimum(i, num_images - 1)
        row_lse = tl.load(lse + row, mask=i < num_images, other=float("inf"))  # exp(s - inf) = 0 beyond the last image
        s = tl.zeros((ROWS, CODES), tl.float32)
        s = _partial_logits(s, rows, row * F, data, seed, first_word, k, num_codes, F, STORAGE, STEP, CODES, EVEN)
        total += tl.exp(s - row_lse[:, None])
    code = k + tl.arange(0, CODES)
    tl.store(means_out + view.to(tl.int64) * num_codes + code, tl.sum(total, 0) / num_images, mask=code < num_codes)


@triton.jit
def _logits(
    rows, row_start, h, data, seed, first_word, k, num_codes, F: tl.constexpr, STORAGE: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, CODES: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """(logits (ROWS, CODES) of a tile of codes; its codes, one tensor per step of F, () where rows are not whole)."""
    s = tl.zeros((ROWS, CODES), tl.float32)
    w = ()
    if WHOLE:
        w = _code_steps(data, seed, first_word, k, num_codes, F, STORAGE, STEP, CODES, EVEN, rows.dtype.element_ty)
        for step in tl.static_range(len(w)):
            s = tl.dot(h[step], w[step], s, input_precision="ieee")
    else:
        s = _partial_logits(s, rows, row_start, data, seed, first_word, k, num_codes, F, STORAGE, STEP, CODES, EVEN)
    return s, w


@triton.jit
def _partial_logits(
    s, rows, row_start, data, seed, first_word, k, num_codes,
    F: tl.constexpr, STORAGE: tl.constexpr, STEP: tl.constexpr, CODES: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """s + rows . w with rows that are read anew for each tile of codes."""
    dtype: tl.constexpr = rows.dtype.element_ty
    for f in range(0, F, STEP):
        h = _row_step(rows, row_start, f, F, STEP, EVEN)
        w = _code_step(data, seed, first_word, f, k, num_codes, F, STORAGE, STEP, CODES, EVEN, dtype)
        s = tl.dot(h, w, s, input_precision="ieee")
    return s


@triton.jit
def _load_slope(slope, k, num_codes, CODES: tl.constexpr, EVEN: tl.constexpr):
    code = k + tl.arange(0, CODES)
    if EVEN:
        return tl.load(slope + code)[None, None, :]
    return tl.load(slope + code, mask=code < num_codes, other=0.0)[None, None, :]


@triton.jit
def _split_views(x, ROWS: tl.constexpr, CODES: tl.constexpr):
    """(ROWS, CODES) -> (ROWS / 16, 8, CODES) for each of the two views."""
    return tl.split(tl.permute(tl.reshape(x, (ROWS // 16, 2, 8, CODES)), (0, 2, 3, 1)))


@triton.jit
def _join_views(first, second, ROWS: tl.constexpr, CODES: tl.constexpr):
    return tl.reshape(tl.permute(tl.join(first, second), (0, 3, 1, 2)), (ROWS, CODES))


@triton.jit
def _zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr):
    steps = ()
    for _ in tl.static_range(COLUMNS // STEP):
        steps += (tl.zeros((ROWS, STEP), tl.float32),)
    return steps


@triton.jit
def _scaled(steps, scale):
    scaled = ()
    for step in tl.static_range(len(steps)):
        scaled += (steps[step] * scale[:, None],)
    return scaled


@triton.jit
def _add_products(
    steps, weights, w, data, seed, first_word, column, k, num_codes, F: tl.constexpr,
    STORAGE: tl.constexpr, STEP: tl.constexpr, CODES: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """steps[f] + weights (ROWS, CODES) . w[f]^T for every step of the columns; without w, codes are decoded anew."""
    added = ()
    for step in tl.static_range(len(steps)):
        if WHOLE:
            codes = w[step]
        else:
            f = column + step * STEP
            codes = _code_step(data, seed, first_word, f, k, num_codes, F, STORAGE, STEP, CODES, EVEN, weights.dtype)
        added += (tl.dot(weights, tl.trans(codes), steps[step], input_precision="ieee"),)
    return added


@triton.jit
def _store_steps(pointers, steps, mask, column, F: tl.constexpr, STEP: tl.constexpr):
    for step in tl.static_range(len(steps)):
        f = column + step * STEP + tl.arange(0, STEP)
        tl.store(pointers[:, None] + f[None, :], steps[step], mask=mask[:, None] & (f < F)[None, :])


@triton.jit
def _row_steps(rows, row_start, F: tl.constexpr, STEP: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr):
    """The rows, one tensor per step of F, to be kept from tile to tile; () where they are read anew."""
    steps = ()
    if WHOLE:
        for step in tl.static_range((F + STEP - 1) // STEP):
            steps += (_row_step(rows, row_start, step * STEP, F, STEP, EVEN),)
    return steps


@triton.jit
def _row_step(rows, row_start, f, F: tl.constexpr, STEP: tl.constexpr, EVEN: tl.constexpr):
    """Columns f .. f + STEP of rows, 0 beyond F: there codes may be anything."""
    column = f + tl.arange(0, STEP)
    pointers = rows + (row_start[:, None] + column[None, :])
    if EVEN:
        return tl.load(pointers)
    return tl.load(pointers, mask=(column < F)[None, :], other=0.0)


@triton.jit
def _code_steps(
    data, seed, first_word, k, num_codes, F: tl.constexpr,
    STORAGE: tl.constexpr, STEP: tl.constexpr, CODES: tl.constexpr, EVEN: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    steps = ()
    for step in tl.static_range((F + STEP - 1) // STEP):
        w = _code_step(data, seed, first_word, step * STEP, k, num_codes, F, STORAGE, STEP, CODES, EVEN, dtype)
        steps += (w,)
    return steps


@triton.jit
def _code_step(
    data, seed, first_word, f, k, num_codes, F: tl.constexpr,
    STORAGE: tl.constexpr, STEP: tl.constexpr, CODES: tl.constexpr, EVEN: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Codes k .. k + CODES, rows f .. f + STEP of the dictionary: (STEP, CODES) of -1 and +1 in dtype."""
    f = tl.core.to_tensor(f)
    k = tl.core.to_tensor(k)
    if STORAGE == "int8" and not EVEN:
        # a shift by 0 that the compiler does not see through: else each warp decodes the whole tile for itself on sm_80
        nothing = (tl.arange(0, CODES) // CODES)[None, :]
        signs = _code_bytes(data, f, k, num_codes, F, STEP, CODES).to(tl.int32) << nothing
    elif STORAGE == "int8":
        words = _stored_words(data, f, k, num_codes, 4, F, STEP, CODES, EVEN)
        signs = tl.reshape(words[:, :, None] << (24 - 8 * tl.arange(0, 4))[None, None, :], (STEP, CODES))
    else:
        if STORAGE == "bits":
            words = _stored_words(data, f, k, num_codes, 32, F, STEP, CODES, EVEN)
        else:
            words = _hashed_words(seed, first_word, f, k, STEP, CODES)
        signs = tl.reshape(~words[:, :, None] << (31 - tl.arange(0, 32))[None, None, :], (STEP, CODES))
    # the sign bit of -1 or +1 and the other bits of 1.0
    return ((signs & -0x80000000) | 0x3F800000).to(tl.float32, bitcast=True).to(dtype)


@triton.jit
def _code_bytes(data, f, k, num_codes, F: tl.constexpr, STEP: tl.constexpr, CODES: tl.constexpr):
    """(STEP, CODES) int8 of -1 and +1."""
    row = tl.arange(0, STEP)[:, None]
    code = tl.arange(0, CODES)[None, :]
    pointers = data + (f.to(tl.int64) * num_codes + k) + (row * num_codes + code)
    return tl.load(pointers, mask=(f + row < F) & (k + code < num_codes), other=1)


@triton.jit
def _stored_words(
    data, f, k, num_codes, PER_WORD: tl.constexpr,
    F: tl.constexpr, STEP: tl.constexpr, CODES: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """(STEP, CODES / PER_WORD) int32: codes as they lie in memory, PER_WORD to a word, the first in the lowest bits."""
    num_words = tl.cdiv(num_codes, PER_WORD)
    row = tl.arange(0, STEP)[:, None]
    word = tl.arange(0, CODES // PER_WORD)[None, :]
    pointers = data + (f.to(tl.int64) * num_words + k // PER_WORD) + (row * num_words + word)
    if EVEN:
        return tl.load(pointers)
    return tl.load(pointers, mask=(f + row < F) & (k // PER_WORD + word < num_words), other=0)


@triton.jit
def _hashed_words(seed, first_word, f, k, STEP: tl.constexpr, CODES: tl.constexpr):
    """The same words by `dictionary.random_words`, a hash of (seed, row, word), words counted from first_word."""
    # k >> 31 is 0; with it a row's key is made anew for each tile, not held in registers from tile to tile
    row = (f + (k >> 31) + tl.arange(0, STEP)).to(tl.uint32)
    word = (first_word + k // 32 + tl.arange(0, CODES // 32)).to(tl.uint32)
    key = _hash32(_hash32(row * 0 + seed.to(tl.uint32)) ^ row)[:, None]
    words = _hash32(_hash32(key ^ word[None, :]) + key).to(tl.int32, bitcast=True)
    # each word plus 0: a sum over a first axis is where the compiler has to spread words over threads; else every lane
    # computes all words that its codes are in
    return tl.xor_sum(tl.where(tl.arange(0, 2)[:, None, None] == 0, words[None, :, :], 0), 0)


@triton.jit
def _hash32(x):
    """Finaliser of MurmurHash3 on uint32."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)

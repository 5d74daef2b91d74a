"""The Triton kernels against float64 formulas in the interpreter, and what they compile to, both without a GPU.

This file is also the program that runs in the interpreter, whose flag must be set before triton is imported:
TRITON_INTERPRET=1 python tests/test_triton_kernels.py OUT computes every case below and stores the errors in OUT.
"""

import importlib.metadata
import itertools
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a program

from dictionary import STORAGES, Dictionary, rademacher_codes

FLOAT32_LIMIT, BFLOAT16_LIMIT = 1e-5, 1e-2  # errors, relative to the largest entry
SHAPES = {"whole": (32, 64, 32, 0, 4, 2), "split": (16, 32, 32, 32, 4, 2)}  # of triton_kernels.Shape
SIZES = {  # B, F, K, standard deviation of the logits, local views, shares
    "odd": (19, 40, 101, 3.0, False, 2),
    "odd-local": (9, 40, 101, 3.0, True, 3),
    "even": (16, 64, 96, 3.0, False, 3),
    "large": (5, 33, 70, 60.0, True, 1),
}
CASES = {"-".join(case): case for case in itertools.product(STORAGES, SIZES, SHAPES)}


# ---- formulas in float64 ---------------------------------------------------------------------------------------------


def expected_means(s, lse, num_views):
    return (s - lse.double()[:, None]).exp().unflatten(0, (num_views, -1)).mean(dim=1)


def expected_gradient(s, local, signs, lse, offset, slope, agreement):
    s = s.unflatten(0, (2, -1))
    predicted = s.flip(0) if local is None else s.flip(0) + local.double() @ signs
    lse, offset = (x.double().unflatten(0, (2, -1))[:, :, None] for x in (lse, offset))
    weights = (s - lse).exp() * (slope.double()[:, None] - agreement * predicted - offset)
    return (weights @ signs.T).flatten(0, 1), weights.sum(dim=2).flatten()


def errors(storage, size, mode=None, device="cpu", dtype=torch.float32):
    """Largest error of each result, relative to the largest entry, or 1. mode: of SHAPES; None: the tuned shapes."""
    from fused_loss import triton_kernels as kernels

    batch_size, dim, num_codes, deviation, has_local, shares = SIZES.get(size, size)
    generator = torch.Generator().manual_seed(batch_size + dim)
    codes = Dictionary(dim, num_codes, seed=7, storage=storage).to(device)
    signs = rademacher_codes(dim, num_codes, seed=7).double().to(device)
    noise = torch.randn(3 * batch_size, dim, generator=generator) * (deviation / math.sqrt(dim))
    rows, local = noise.to(device, dtype).split([2 * batch_size, batch_size])
    rows, local = rows.contiguous(), local.contiguous() if has_local else None
    s = rows.double() @ signs
    lse = s.logsumexp(dim=1).float()
    offset = torch.randn(2 * batch_size, generator=generator).to(device)
    slope = torch.randn(2, num_codes, generator=generator).to(device)

    shape = mode and kernels.Shape(*SHAPES[mode])
    top, total, centers = kernels.statistics(rows, codes, shares=shares, shape=shape)
    means = kernels.means(rows, codes, lse, 2, shape=shape)
    rest = (lse, offset, slope, 0.3)
    product, mass = kernels.gradient(rows, local, codes, *rest, shares=shares, shape=shape)

    assert shape is None or shares == 1 or len(top) > 1  # several shares were put together
    scale = (top.double() - s.logsumexp(dim=1)).exp()
    want_product, want_mass = expected_gradient(s, local, signs, *rest)
    largest = want_product.abs().max()
    compared = {
        "total": ((scale * total).sum(dim=0), torch.ones_like(s[:, 0])),
        "centers": ((scale[:, :, None] * centers).sum(dim=0), s.softmax(dim=1) @ signs.T),
        "means": (means * num_codes, expected_means(s, lse, 2) * num_codes),
        "product": (product / largest, want_product / largest),
        "mass": (mass / largest, want_mass / largest),  # what it is subtracted from, times m; itself it may be 0
    }
    return {
        name: float((got - want).abs().max() / want.abs().max().clamp_min(1)) for name, (got, want) in compared.items()
    }


def limit(size, dtype=torch.float32):
    """A float32 logit, or lse, is off by some 2^-24 of itself, and its exp by that many nats."""
    largest_logit = 4 * SIZES.get(size, size)[3]
    return (FLOAT32_LIMIT if dtype == torch.float32 else BFLOAT16_LIMIT) + 4 * largest_logit * 2**-24


def errors_of_the_loss(storage, prior, num_views, device="cpu", dtype=torch.float32):
    """Of value and gradients of the whole loss by Triton, against its definition in float64."""
    from cplearn_head import code_temperature, cplearn_loss
    from fused_loss import fused_cplearn_loss

    batch_size, dim, num_codes = 9, 40, 101
    generator = torch.Generator().manual_seed(num_views)
    codes = Dictionary(dim, num_codes, seed=7, storage=storage).to(device)
    noise = torch.randn(num_views, batch_size, dim, generator=generator)
    radius = math.sqrt(dim / batch_size)
    views = [(torch.nn.functional.normalize(h, dim=1) * radius).to(device).requires_grad_() for h in noise]
    exact = [h.detach().double().requires_grad_() for h in views]
    settings = code_temperature(num_codes, dim, batch_size), 0.3, prior
    value, _ = fused_cplearn_loss(views, codes, *settings, impl="triton", compute_dtype=dtype)
    expected, _ = cplearn_loss(exact, codes, *settings)
    got, want = torch.autograd.grad(value, views), torch.autograd.grad(expected, exact)
    value, expected = value.detach(), expected.detach()
    scale = max(g.abs().max() for g in want)
    gradient = max(float((g - w).abs().max() / scale) for g, w in zip(got, want, strict=True))
    return {"value": float((value - expected).abs() / expected.abs()), "gradient": gradient}


# ---- in the interpreter ----------------------------------------------------------------------------------------------


def version_of(package):
    return tuple(map(int, importlib.metadata.version(package).split(".")[:2]))


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    triton, numpy = (version_of(package) for package in ("triton", "numpy"))
    if triton < (3, 8) and numpy >= (2, 4):
        pytest.skip(
            f"Triton {triton} and numpy {numpy}: before 3.8 Triton's interpreter takes int() of arrays of one element, "
            "which numpy refuses from 2.4 on"
        )
    out = tmp_path_factory.mktemp("interpreter") / "errors.pt"
    environment = dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, __file__, out], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_the_formulas(interpreted, case):
    assert max(interpreted[case].values()) < limit(CASES[case][1]), interpreted[case]


LOSSES = list(itertools.product(STORAGES, ("kl", "ce"), (2, 4)))


@pytest.mark.parametrize("case", LOSSES)
def test_loss_equals_its_definition(interpreted, case):
    assert max(interpreted[("loss", *case)].values()) < FLOAT32_LIMIT, interpreted[("loss", *case)]


@pytest.mark.parametrize("storage", STORAGES)
def test_kernels_read_the_dictionary(interpreted, storage):
    """Rows of the identity have the codes themselves as logits; also for the last shard of many."""
    for shard, codes in interpreted["codes", storage].items():
        expected = rademacher_codes(5, 64, seed=-3, first=64 * shard)
        assert torch.equal(codes, expected)


def read_codes(storage, shard):
    from fused_loss import triton_kernels as kernels

    codes = Dictionary(5, 64 * 1000, seed=-3, storage=storage, shard=(shard, 1000))
    exponentials = kernels.means(torch.eye(5), codes, torch.zeros(5), num_views=5)
    return exponentials.log().round().to(torch.int8)


def run_in_interpreter(out):
    torch.set_num_threads(1)
    results = {name: errors(*case) for name, case in CASES.items()}
    for case in LOSSES:
        results[("loss", *case)] = errors_of_the_loss(*case)
    for storage in STORAGES:
        results["codes", storage] = {shard: read_codes(storage, shard) for shard in (0, 999)}
    torch.save(results, out)


# ---- compiled without a GPU ------------------------------------------------------------------------------------------

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes a block may have: CUDA C++ programming guide, table 24
INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async"}
KERNELS = [("statistics", False), ("means", False), ("gradient", False), ("gradient", True)]  # name, local views
QUICK = [(*kernel, 384, "bits", arch, True) for kernel in KERNELS[:3] for arch in (80, 90)]
EVERY = [
    (*kernel, dim, storage, arch, True)
    for kernel in KERNELS for dim in (192, 384, 512, 2048) for storage in STORAGES for arch in (80, 90)
]  # fmt: skip
UNEVEN = [(*kernel, 384, "int8", arch, False) for kernel in KERNELS for arch in (80, 90)]


@pytest.mark.parametrize("kernel, has_local, dim, storage, arch, even", QUICK)
def test_compiles_to_what_was_measured(tmp_path, monkeypatch, kernel, has_local, dim, storage, arch, even):
    found = compiled(tmp_path, monkeypatch, kernel, has_local, dim, storage, arch, even)
    assert INSTRUCTION[arch] in found.ptx
    assert found.shared <= SHARED_MEMORY[arch]
    assert found.spilled == 0


@pytest.mark.slow
@pytest.mark.parametrize("kernel, has_local, dim, storage, arch, even", sorted({*EVERY, *UNEVEN} - {*QUICK}))
def test_every_shape_compiles(tmp_path, monkeypatch, kernel, has_local, dim, storage, arch, even):
    found = compiled(tmp_path, monkeypatch, kernel, has_local, dim, storage, arch, even)
    assert INSTRUCTION[arch] in found.ptx
    assert found.shared <= SHARED_MEMORY[arch]
    assert found.spilled == 0 or not even  # masks take registers


def compiled(tmp_path, monkeypatch, kernel, has_local, dim, storage, arch, even):
    """One kernel as it would run for that many codes: its PTX, shared memory, and what ptxas says of registers."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fused_loss import triton_kernels as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    shape = kernels.tuned_shape(kernel, dim, has_local, f"sm_{arch}", storage)
    codes = SimpleNamespace(shape=(dim, 2**17 if even else 2**17 - 1), storage=storage)
    constants = kernels._constants(codes, shape)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    function = getattr(kernels, f"_{kernel}_kernel")
    if kernel == "gradient":
        constants["HAS_LOCAL"] = has_local
    if storage == "seed":
        constants["data"] = None
    types = {name: argument_type(name, storage, even) for name in function.arg_names}
    signature = {name: "constexpr" if name in constants else kind for name, kind in types.items()}
    aligned = [n for n, name in enumerate(signature) if "*" in signature[name] or (even and name == "num_codes")]
    source = ASTSource(
        fn=function, signature=signature, constexprs=constants,
        attrs={(n,): [["tt.divisibility", 16]] for n in aligned},
    )  # fmt: skip
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = tmp_path / "kernel.ptx"
    ptx.write_text(binary.asm["ptx"])
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    name = {80: "sm_80", 90: "sm_90a"}[arch]
    report = subprocess.run(
        [ptxas, "-v", f"--gpu-name={name}", ptx, "-o", tmp_path / "kernel.cubin"], capture_output=True, text=True
    ).stderr
    registers, spilled = (int(re.search(x, report)[1]) for x in (r"Used (\d+) registers", r"(\d+) bytes spill stores"))
    print(f"{kernel} {has_local=} {dim=} {storage} sm_{arch} {even=}: {registers} registers, {spilled} bytes spilled, "
          f"{binary.metadata.shared} bytes of shared memory")  # fmt: skip
    return SimpleNamespace(ptx=binary.asm["ptx"], shared=binary.metadata.shared, spilled=spilled)


def argument_type(name, storage, even):
    if name == "data":
        return "*i8" if storage == "int8" and not even else "*i32"
    if name in ("rows", "local"):
        return "*bf16"
    if name in ("lse", "offset", "slope") or name.endswith("_out"):
        return "*fp32"
    return "fp32" if name == "agreement" else "i32"


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dim", [40, 192, 384, 512])
@pytest.mark.parametrize("has_local", [False, True])
def test_kernels_equal_the_formulas_on_a_gpu(storage, dim, has_local, dtype):
    for num_codes in (4096, 3333):
        size = (70, dim, num_codes, 3.0, has_local, None)
        found = errors(storage, size, device="cuda", dtype=dtype)
        assert max(found.values()) < limit(size, dtype), found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", LOSSES)
def test_loss_equals_its_definition_on_a_gpu(case, dtype):
    found = errors_of_the_loss(*case, device="cuda", dtype=dtype)
    assert max(found.values()) < (FLOAT32_LIMIT if dtype == torch.float32 else BFLOAT16_LIMIT), found


# ---- wrong inputs ----------------------------------------------------------------------------------------------------


def test_wrong_inputs_stop():
    from fused_loss import triton_kernels as kernels

    codes = Dictionary(16, 64)
    rows, per_row, slope = torch.zeros(4, 16), torch.zeros(4), torch.zeros(2, 64)
    with pytest.raises(ValueError, match="exactly 2"):
        kernels.gradient(rows, None, codes, per_row, per_row, slope, 0.1, num_global=1)
    with pytest.raises(ValueError, match="expected"):
        kernels.gradient(rows, None, codes, per_row[:2], per_row, slope, 0.1)
    with pytest.raises(ValueError, match="expected"):
        kernels.statistics(rows.double(), codes)
    with pytest.raises(ValueError, match="contiguous"):
        kernels.statistics(torch.zeros(16, 4).T, codes)
    with pytest.raises(ValueError, match="3 views"):
        kernels.means(rows, codes, per_row, num_views=3)


if __name__ == "__main__":
    run_in_interpreter(sys.argv[1])

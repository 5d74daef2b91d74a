"""The frozen dictionary: K codes of width F with entries -1 and +1, as int8, as bits, or as nothing but a seed.

Codes are a pure function of (F, K, seed): bit k % 32 of a 32-bit hash of (seed, row, k // 32). Any part of a dictionary
can so be computed alone, and is the same on CPU, in a Triton kernel, and with any version of torch (tests hold known
answers). K codes of width F take F K bytes as int8, F K / 8 as bits, none as a seed.

A Hadamard dictionary has blocks of F orthogonal codes, W_b = diag(signs_b) H with H H^T = F I and random signs, the
last block cut; with K = F, W^T W = F I, as Theorem 1 of the paper assumes.

    F head width, K codes, n blocks
"""

import functools
import math

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

STORAGES = ("int8", "bits", "seed")
WORD = 32  # codes in one hashed word
HASH_OFFSET = 0x9E3779B9  # the hash maps 0 to 0: without it the first word of seed 0 has no +1
HASHED_AT_ONCE = 2**22  # words: bounds the memory of building a large dictionary


class Dictionary(nn.Module):
    """Independent fair signs, (dim, num_codes), of which this process may hold a shard.

    storage: "int8" (F K bytes, the quickest), "bits" (F K / 8, unpacked tile by tile) or "seed" (hashed tile by tile).
    shard: (index, number of shards): codes [first, first + K / shards) of the K. More than one needs K
    divisible by 32 x shards.

    kind: "rademacher".  shape: (F, codes held here).  num_codes: K.  first: index of the first code held here.
    data: (F, K) int8; or (F, ceil(K / 32)) int32, bit k % 32 of word k // 32 set for +1; or None.
    """

    kind = "rademacher"

    def __init__(self, dim, num_codes, seed=0, storage="int8", shard=(0, 1)):
        super().__init__()
        index, num_shards = shard
        if storage not in STORAGES:
            raise ValueError(f"storage is {storage!r}; expected one of {STORAGES}")
        whole = num_shards * self.indivisible(dim)
        if num_shards > 1 and num_codes % whole:
            raise ValueError(f"{num_codes} codes in {num_shards} shards; expected a multiple of {whole}")
        self.num_codes, self.seed, self.storage, self.sharded = num_codes, seed, storage, num_shards > 1
        self.shape = (dim, num_codes // num_shards)
        self.first = index * self.shape[1]
        self.register_buffer("anchor", torch.empty(0), persistent=False)  # on this module's device
        self.register_buffer("data", None, persistent=False)
        self._packed = None
        self.fill()

    @staticmethod
    def indivisible(dim):
        """Codes that no two shards can divide between them."""
        return WORD

    @classmethod
    def of(cls, codes):
        """A dictionary of given codes, (F, K) of -1 and +1; a Dictionary as it is."""
        if isinstance(codes, Dictionary):
            return codes
        self = cls(codes.shape[0], codes.shape[1], storage="seed")
        self.storage, self.data, self.anchor = "int8", codes, torch.empty(0, device=codes.device)
        return self

    @property
    def device(self):
        return self.anchor.device

    def fill(self, packed=None):
        """Take the codes from bits of the whole dictionary as `pack_codes` makes them, or from the seed."""
        self._packed = None
        part = *self.shape, self.seed, self.first
        if packed is not None:
            packed = packed[:, self.first // 8 : self.first // 8 + math.ceil(self.shape[1] / 8)]
        if self.storage == "int8":
            codes = rademacher_codes(*part) if packed is None else unpack_codes(packed, self.shape[1])
            self.data = codes.contiguous().to(self.device)
        if self.storage == "bits":
            self.data = (code_words(*part) if packed is None else _words_of(packed)).to(self.device)

    def tile(self, start, stop):
        """Codes start to stop of those held here: (F, stop - start) int8."""
        if self.storage == "int8":
            return self.data[:, start:stop]
        begin = start - start % WORD
        if self.storage == "bits":
            words = self.data[:, begin // WORD : math.ceil(stop / WORD)]
        else:
            words = code_words(self.shape[0], stop - begin, self.seed, self.first + begin, self.device)
        return decode_words(words, stop - begin)[:, start - begin :]

    def dense(self):
        """All codes held here, (F, K) int8."""
        return self.tile(0, self.shape[1])

    def columns(self, index):
        """Codes of the given indices among those held here: (n,) int64 -> (F, n) int8."""
        if self.storage == "int8":
            return self.data[:, index]
        if self.storage == "bits":
            words = self.data[:, index // WORD]
        else:
            rows = torch.arange(self.shape[0], device=index.device)[:, None]
            words = random_words(self.seed, rows, (self.first + index) // WORD)
        return ((words >> (index % WORD).to(words.dtype)) & 1).to(torch.int8) * 2 - 1

    def packed(self):
        """The dictionary as bits on the CPU, (F, ceil(K / 8)) uint8; None where its seed stands for it in a checkpoint.

        They are packed at the first call and kept, so that every later checkpoint costs nothing: do not change them."""
        if self._packed is None and self.travels_as_bits():
            self._packed = self._stored_bits() if self.storage == "bits" else pack_codes(self.dense())
        return self._packed

    def _stored_bits(self):
        packed = self.data.view(torch.uint8)[:, : math.ceil(self.shape[1] / 8)].cpu().clone()
        if self.shape[1] % 8:
            packed[:, -1] &= 2 ** (self.shape[1] % 8) - 1  # hashed words go on after the last code
        return packed

    def travels_as_bits(self):
        return self.storage != "seed" and not self.sharded

    def num_bytes(self):
        """Of memory."""
        return 0 if self.data is None else self.data.numel() * self.data.element_size()

    def extra_repr(self):
        held = f", {self.shape[1]} of them from {self.first}" if self.sharded else ""
        return f"F={self.shape[0]}, K={self.num_codes}{held}, {self.storage}, seed={self.seed}"


def rademacher_codes(dim, num_codes, seed=0, first=0):
    """Independent fair signs, (dim, num_codes) int8 of -1 and +1: codes `first` (a multiple of 32) and on of `seed`.

    The columns do not depend on how many are asked for.
    """
    codes = torch.empty(dim, num_codes, dtype=torch.int8)
    step = max(WORD, HASHED_AT_ONCE // dim * WORD)
    for start in range(0, num_codes, step):
        part = codes[:, start : start + step]
        part.copy_(decode_words(code_words(dim, part.shape[1], seed, first + start), part.shape[1]))
    return codes


def code_words(dim, num_codes, seed=0, first=0, device=None):
    """The same codes as bits: (dim, ceil(num_codes / 32)) int32."""
    row = torch.arange(dim, device=device)[:, None]
    begin, end = first // WORD, math.ceil((first + num_codes) / WORD)
    words = torch.empty(dim, end - begin, dtype=torch.int32, device=device)
    step = max(1, HASHED_AT_ONCE // dim)
    for start in range(begin, end, step):
        word = torch.arange(start, min(start + step, end), device=device)[None, :]
        words[:, start - begin : start - begin + step] = random_words(seed, row, word)
    return words


def random_words(seed, row, word):
    """32 random bits each for (seed, row, word), as int32: broadcast int64 tensors row, word below 2^32."""
    key = _hash32(_hash32(torch.tensor((seed + HASH_OFFSET) % 2**32)) ^ row)
    hashed = _hash32(_hash32(key ^ word) + key)  # below 2^32
    return torch.where(hashed < 2**31, hashed, hashed - 2**32).to(torch.int32)


def _hash32(x):
    """Finaliser of MurmurHash3 (Appleby, public domain) on int64 tensors taken modulo 2^32."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)


def decode_words(words, num_codes):
    """(F, ceil(num_codes / 32)) int32 -> (F, num_codes) int8 of -1 and +1."""
    return unpack_codes(words.contiguous().view(torch.uint8), num_codes)  # little-endian, as all of torch's hosts are


def pack_codes(codes):
    """(dim, num_codes) of -1 and +1 -> (dim, ceil(num_codes / 8)) uint8: bit k % 8 of byte k // 8 is 1 for +1."""
    return torch.from_numpy(np.packbits(codes.cpu().numpy() > 0, axis=1, bitorder="little"))


def unpack_codes(packed, num_codes):
    """Inverse of `pack_codes`: (dim, ceil(num_codes / 8)) uint8 -> (dim, num_codes) int8 of -1 and +1."""
    octets = torch.index_select(_octets(packed.device), 0, packed.flatten().int())
    return octets.view(torch.int8).view(len(packed), -1)[:, :num_codes]


@functools.cache
def _octets(device):
    """The eight codes of each byte, as one int64: (256,)."""
    signs = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little").view(np.int8) * 2 - 1
    return torch.from_numpy(signs.view(np.int64)[:, 0].copy()).to(device)


def _words_of(packed):
    """(F, ceil(K / 8)) uint8 -> (F, ceil(K / 32)) int32; missing bytes are zero."""
    missing = -packed.shape[1] % 4
    return nn.functional.pad(packed, (0, missing)).contiguous().view(torch.int32)


@torch.no_grad()
def nearest_code(h, codes, tile=None):
    """argmax_k of the logits of h (B, F) over codes (F, K), in tiles of codes: (B,) int64, O(B x tile) memory.

    codes: a tensor or a Dictionary. With a sharded one all processes must call this, with equal h.
    tile: codes in a tile; None: what suits the device."""
    codes = Dictionary.of(codes)
    tile = tile or codes_in_tile((h.shape[1] + 2 * len(h)) * h.element_size(), h.device)
    best = torch.full((len(h),), -math.inf, dtype=h.dtype, device=h.device)
    nearest = torch.zeros(len(h), dtype=torch.int64, device=h.device)
    for start in range(0, codes.shape[1], tile):
        score, k = (h @ codes.tile(start, min(start + tile, codes.shape[1])).to(h.dtype)).max(dim=1)
        nearest = torch.where(score > best, k + (codes.first + start), nearest)
        best = torch.maximum(score, best)
    return highest_over_processes(best, nearest) if codes.sharded else nearest


def codes_in_tile(bytes_per_code, device):
    """Codes in a tile, a power of two, where a code and what is computed of it take so many bytes.

    On a CPU a tile stays in a core's cache. Elsewhere each operation costs a launch, so that a tile takes up to 2 GB, a
    whole one while PyTorch computes; what is best on a GPU was not timed."""
    memory = 2**23 if device.type == "cpu" else 2**31
    return 2 ** max(7, math.floor(math.log2(memory / bytes_per_code)))


def highest_over_processes(score, index):
    """The index (B,) int64 that belongs to the highest score (B,) of any process; the least among equals."""
    highest = score.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    index = torch.where(score == highest, index, torch.iinfo(index.dtype).max)
    dist.all_reduce(index, dist.ReduceOp.MIN)
    return index


# ---- orthogonal codes: Hadamard's matrix and a dictionary of its blocks ----------------------------------------------

PALEY_PRIMES = {12: 11, 20: 19, 28: 13}  # order 28 by the second construction: 2 (13 + 1)
SIGNS_SALT = 0x48414441  # the blocks' signs are not the first rows of a Rademacher dictionary of the same seed


def hadamard_matrix(order):
    """H (order, order) int8 of -1 and +1 with H H^T = order * I, its first row ones.

    order: 2^m times 1, 12, 20 or 28. Raises ValueError for any other, and names the nearest two.
    Sylvester's construction, and Paley's for 12, 20 and 28 (J. Math. Phys. 12, 1933).
    """
    base = base_order(order)
    matrix = np.ones((1, 1), dtype=np.int8) if base == 1 else _paley(base)
    sylvester = np.ones((1, 1), dtype=np.int8)
    while len(sylvester) < order // base:
        sylvester = np.kron(np.array([[1, 1], [1, -1]], dtype=np.int8), sylvester)
    return torch.from_numpy(np.kron(matrix, sylvester))


def base_order(order):
    """1, 12, 20 or 28: what Sylvester's construction leaves of `order`. Raises ValueError as `hadamard_matrix`."""
    known = {base * 2**m: base for base in (1, *PALEY_PRIMES) for m in range(24)}
    if order not in known:
        below, above = max(n for n in (1, *known) if n <= max(order, 1)), min(n for n in known if n > order)
        raise ValueError(f"no Hadamard matrix of order {order} here; the nearest orders are {below} and {above}")
    return known[order]


def _paley(order):
    prime = PALEY_PRIMES[order]
    squares = {i * i % prime for i in range(1, prime)}
    residue = np.array([0] + [1 if i in squares else -1 for i in range(1, prime)])  # Legendre's symbol
    conference = np.zeros((prime + 1, prime + 1), dtype=int)
    conference[1:, 1:] = residue[np.subtract.outer(range(prime), range(prime)) % prime]
    conference[0, 1:] = 1
    if order == prime + 1:  # prime = 3 mod 4: conference is skew
        conference[1:, 0] = -1
        matrix = conference + np.eye(order, dtype=int)
    else:  # prime = 1 mod 4: symmetric
        conference[1:, 0] = 1
        matrix = np.kron(conference, [[1, 1], [1, -1]]) + np.kron(np.eye(prime + 1, dtype=int), [[1, -1], [-1, -1]])
    return (matrix * matrix[0]).astype(np.int8)


def block_signs(dim, num_blocks, seed=0, first_block=0):
    """(num_blocks, dim) int8 of -1 and +1, of blocks first_block and on: a pure function of its arguments.

    The hash of (seed, row, block) that gives `rademacher_codes`, of which a block takes one code.
    """
    before = first_block % WORD
    columns = rademacher_codes(dim, before + num_blocks, seed ^ SIGNS_SALT, first_block - before)
    return columns[:, before:].T.contiguous()


class HadamardDictionary(Dictionary):
    """Blocks of F codes, each a Hadamard matrix whose rows have random signs: `Dictionary`, but for what it keeps.

    data: the signs, (n, F) int8, one per code. storage has no other form of them: only its default is accepted.
    shard: more than one needs K divisible by F x shards.
    """

    kind = "hadamard"

    def __init__(self, dim, num_codes, seed=0, storage="int8", shard=(0, 1)):
        base_order(dim)
        if storage != "int8":
            raise ValueError(f"storage is {storage!r}; a Hadamard dictionary keeps one int8 per code, and has no other")
        super().__init__(dim, num_codes, seed, storage, shard)

    @staticmethod
    def indivisible(dim):
        return dim

    def fill(self, packed=None):
        dim, num_codes = self.shape
        self.data = block_signs(dim, math.ceil(num_codes / dim), self.seed, self.first // dim).to(self.device)

    def tile(self, start, stop):
        return self.columns(torch.arange(start, stop, device=self.device))

    def columns(self, index):
        dim = self.shape[0]
        return self.data[index // dim].T * _matrix_on(self.device, dim)[:, index % dim]

    def travels_as_bits(self):
        return False


@functools.lru_cache(maxsize=4)
def _matrix_on(device, order):
    return hadamard_matrix(order).to(device)

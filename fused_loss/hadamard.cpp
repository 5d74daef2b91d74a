// CPLearn's two passes over a dictionary of Hadamard blocks, in float32. hadamard_transforms.py compiles this file and
// says what each function returns. Plain C++17 with the vectors of GCC and Clang; no -ffast-math, which would undo
// `exponential`.
//
// A vector holds one code's numbers for LANES images, so a transform is additions of whole vectors, without shuffles.
// One block of F codes at a time stays in the caches: 4 x images x F numbers in `gradient`.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __SSE__
#include <xmmintrin.h>
#endif

#ifdef __AVX512F__
constexpr int64_t LANES = 16;
#else
constexpr int64_t LANES = 8;
#endif
typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

struct FlushSubnormals {  // with logits of several hundred `gradient` would take 15 times as long, for nothing
#ifdef __SSE__
    unsigned saved = _mm_getcsr();
    FlushSubnormals() { _mm_setcsr(saved | 0x8040); }
    ~FlushSubnormals() { _mm_setcsr(saved); }
#endif
};

static Lanes maximum(Lanes a, Lanes b) { return b > a ? b : a; }  // NaN where a is

// 2^n e^r with |r| <= log(2) / 2, r to its sixth power: relative error below 3e-7. Never less than exp(-87.33), a
// normal number; NaN of NaN.
static Lanes exponential(Lanes x) {
    x = maximum(x, Lanes{} - 87.33f);
    const Lanes shifted = x * 1.44269504f + 0x1.8p23f;  // its low bits are n
    const Lanes n = shifted - 0x1.8p23f;
    const Lanes r = x - n * 0x1.62e4p-1f - n * 0x1.7f7d1cp-20f;  // log 2 in two parts: n times the first is exact
    Lanes e = Lanes{} + 1.0f / 720;
    for (float coefficient : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) e = e * r + coefficient;
    Ints bits, exponent;
    std::memcpy(&bits, &e, sizeof e);
    std::memcpy(&exponent, &shifted, sizeof e);
    bits += exponent << 23;
    std::memcpy(&e, &bits, sizeof e);
    return e;
}

// Two steps of Newton's from exponent and mantissa read as one fixed-point number, which is within 0.05 of log2(x).
static Lanes logarithm(Lanes x) {
    Ints bits;
    std::memcpy(&bits, &x, sizeof x);
    Lanes y = (__builtin_convertvector(bits, Lanes) * 0x1p-23f - 126.957f) * 0.693147181f;
    for (int step = 0; step < 2; ++step) y += x * exponential(-y) - 1.0f;
    return y;
}

template <int N>
static void butterflies(Lanes* x, int64_t dim, int64_t stride) {  // log2(N) levels of the transform in registers
    for (int64_t start = 0; start < dim; start += N * stride)
        for (Lanes* p = x + start; p < x + start + stride; ++p) {
            Lanes v[N];
#pragma GCC unroll 8
            for (int j = 0; j < N; ++j) v[j] = p[j * stride];
#pragma GCC unroll 8
            for (int distance = 1; distance < N; distance *= 2)
#pragma GCC unroll 8
                for (int j = 0; j < N; ++j)
                    if (!(j & distance)) {
                        const Lanes difference = v[j] - v[j + distance];
                        v[j] += v[j + distance];
                        v[j + distance] = difference;
                    }
#pragma GCC unroll 8
            for (int j = 0; j < N; ++j) p[j * stride] = v[j];
        }
}

template <int N>
static void multiply(const float* matrix, Lanes* x, int64_t stride) {
    for (Lanes* p = x; p < x + stride; ++p) {
        Lanes v[N];
        for (int j = 0; j < N; ++j) v[j] = p[j * stride];
        for (int i = 0; i < N; ++i) {
            Lanes sum = {};
#pragma GCC unroll 28
            for (int j = 0; j < N; ++j) sum += matrix[i * N + j] * v[j];
            p[i * stride] = sum;
        }
    }
}

struct Dictionary {  // hadamard_transforms.py's _Dictionary
    int64_t dim, num_codes, base_order;
    const float *base, *base_transposed, *signs;  // (num_blocks, dim)

    int64_t codes_in(int64_t start) const { return std::min(dim, num_codes - start); }

    void transform(Lanes* x, const float* factor) const {  // x (dim,) <- (factor kron Sylvester's matrix) x
        const int64_t size = dim / base_order;
        int64_t stride = 1;
        for (; 8 * stride <= size; stride *= 8) butterflies<8>(x, dim, stride);
        if (4 * stride == size) butterflies<4>(x, dim, stride);
        if (2 * stride == size) butterflies<2>(x, dim, stride);
        if (base_order == 12) multiply<12>(factor, x, size);
        if (base_order == 20) multiply<20>(factor, x, size);
        if (base_order == 28) multiply<28>(factor, x, size);
    }

    void logits(const Lanes* rows, int64_t start, Lanes* out) const {
        for (int64_t f = 0; f < dim; ++f) out[f] = rows[f] * signs[start + f];
        transform(out, base_transposed);
    }

    // sums += sum_k w_k weights[k], and returns sum_k weights[k]: the first row of a Hadamard matrix here is ones
    Lanes combine(Lanes* weights, int64_t start, Lanes* sums) const {
        std::fill(weights + codes_in(start), weights + dim, Lanes{});
        transform(weights, base);
        for (int64_t f = 0; f < dim; ++f) sums[f] += weights[f] * signs[start + f];
        return weights[0];
    }
};

static void load(const float* rows, int64_t count, int64_t dim, Lanes* out) {
    for (int64_t i = 0; i < count; ++i)
        for (int64_t f = 0; f < dim; ++f) out[f][i] = rows[i * dim + f];
}

static void store(const Lanes* x, int64_t count, int64_t dim, float* rows) {
    for (int64_t i = 0; i < count; ++i)
        for (int64_t f = 0; f < dim; ++f) rows[i * dim + f] = x[f][i];
}

static float sum_of_lanes(Lanes x) {
    float sum = 0;
    for (int i = 0; i < LANES; ++i) sum += x[i];
    return sum;
}

extern "C" void statistics(const Dictionary* codes, const float* rows, int64_t num_rows, float* top_out,
                           float* total_out, float* centers_out, int32_t* best_out) {
    const FlushSubnormals flush;
    const int64_t dim = codes->dim;
    for (int64_t first = 0; first < num_rows; first += LANES) {
        const int64_t count = std::min(LANES, num_rows - first);
        std::vector<Lanes> h(dim), x(dim), centers(dim);
        load(rows + first * dim, count, dim, h.data());
        Lanes top = Lanes{} - INFINITY, total = {};
        Ints best = {};
        for (int64_t start = 0; start < codes->num_codes; start += dim) {
            codes->logits(h.data(), start, x.data());
            const int64_t here = codes->codes_in(start);
            const Lanes old_top = top;
            for (int64_t k = 0; k < here; ++k) top = maximum(top, x[k]);
            if (sum_of_lanes(top > old_top ? Lanes{} + 1 : Lanes{}) > 0) {
                for (int64_t k = 0; k < here; ++k) best = x[k] == top ? Ints{} + int32_t(start + k) : best;
                const Lanes shrink = exponential(old_top - top);
                total *= shrink;
                for (Lanes& center : centers) center *= shrink;
            }
            for (int64_t k = 0; k < here; ++k) x[k] = exponential(x[k] - top);
            total += codes->combine(x.data(), start, centers.data());
        }
        std::memcpy(top_out + first, &top, 4 * count);
        std::memcpy(total_out + first, &total, 4 * count);
        std::memcpy(best_out + first, &best, 4 * count);
        store(centers.data(), count, dim, centers_out + first * dim);
    }
}

struct Slope {  // hadamard_transforms.py's class of that name, or numbers given
    const float* given;  // (views, num_codes); null: from pbar itself
    float scale, all_codes;
    int32_t is_ce;

    Lanes at(Lanes mean) const {
        const Lanes smallest = Lanes{} + 2 * 1.17549435e-38f;
        if (is_ce) return mean > smallest ? -scale / (all_codes * mean) : Lanes{};
        return scale * (logarithm(maximum(mean, smallest)) + std::log(all_codes) + 1);
    }
};

struct Group {  // LANES images of one view, and what one block makes of them
    int64_t first, count;  // of its rows among all
    std::vector<Lanes> rows, logits, weights, product;
    Lanes top = {}, share = {}, offset = {}, mass = {};  // share: 1 / total; 0 where there is no image

    Group(int64_t first, int64_t count, int64_t dim)
        : first(first), count(count), rows(dim), logits(dim), weights(dim), product(dim) {}
};

static Lanes lanes(const float* x, int64_t count) {
    Lanes out = {};
    if (x) std::memcpy(&out, x, 4 * count);
    return out;
}

// pbar of `count` codes from sums of p over images by lane, and the prior's slope in it unless that is given
static void means_and_slopes(const Slope& slope, const Lanes* sums, int64_t count, int64_t batch, const float* given,
                             float* means, float* slopes) {
    for (int64_t k = 0; k < count; ++k) means[k] = sum_of_lanes(sums[k]) / batch;
    for (int64_t k = 0; k < count; k += LANES) {
        const int64_t here = std::min(LANES, count - k);
        const Lanes out = given ? lanes(given + k, here) : slope.at(lanes(means + k, here));
        std::memcpy(slopes + k, &out, 4 * here);
    }
}

// weights = p of `count` codes, added to sums
static void probabilities(Group& g, int64_t count, Lanes* sums) {
    for (int64_t k = 0; k < count; ++k) sums[k] += g.weights[k] = exponential(g.logits[k] - g.top) * g.share;
}

// weights = A: the same images' logits in the other views are num_groups apart in `groups`
static void weigh(std::vector<Group>& groups, int64_t q, int64_t num_groups, int64_t count, const float* slopes,
                  float agreement) {
    Group& g = groups[q];
    for (int64_t k = 0; k < count; ++k) {
        Lanes others = {};
        for (int64_t other = q % num_groups; other < int64_t(groups.size()); other += num_groups)
            if (other != q) others += groups[other].logits[k];
        g.weights[k] *= slopes[k] - agreement * others - g.offset;
    }
}

extern "C" void gradient(const Dictionary* codes, const Slope* slope, int64_t views, int64_t all, int64_t batch,
                         const float* rows, const float* top, const float* total, const float* offset, float agreement,
                         float* means, float* product, float* mass) {
    const FlushSubnormals flush;
    const int64_t dim = codes->dim, num_groups = (batch + LANES - 1) / LANES;
    std::vector<Group> groups;  // view after view, the targets first
    for (int64_t q = 0; q < all * num_groups; ++q) {
        const int64_t in_view = q % num_groups * LANES, first = q / num_groups * batch + in_view;
        Group& g = groups.emplace_back(first, std::min(LANES, batch - in_view), dim);
        load(rows + first * dim, g.count, dim, g.rows.data());
        if (q >= views * num_groups) continue;
        g.top = lanes(top + first, g.count), g.offset = lanes(offset + first, g.count);
        for (int64_t i = 0; i < g.count; ++i) g.share[i] = 1 / total[first + i];
    }
    std::vector<float> slopes(views * dim);
    for (int64_t start = 0; start < codes->num_codes; start += dim) {
        const int64_t here = codes->codes_in(start);
        for (Group& g : groups) codes->logits(g.rows.data(), start, g.logits.data());
        for (int64_t view = 0; view < views; ++view) {
            std::vector<Lanes> sums(dim);
            for (int64_t q = view * num_groups; q < (view + 1) * num_groups; ++q)
                probabilities(groups[q], here, sums.data());
            const int64_t at = view * codes->num_codes + start;
            const float* given = slope->given ? slope->given + at : nullptr;
            means_and_slopes(*slope, sums.data(), here, batch, given, means + at, &slopes[view * dim]);
        }
        for (int64_t q = 0; product && q < views * num_groups; ++q) {
            weigh(groups, q, num_groups, here, &slopes[q / num_groups * dim], agreement);
            groups[q].mass += codes->combine(groups[q].weights.data(), start, groups[q].product.data());
        }
    }
    for (int64_t q = 0; product && q < views * num_groups; ++q) {
        const Group& g = groups[q];
        store(g.product.data(), g.count, dim, product + g.first * dim);
        std::memcpy(mass + g.first, &g.mass, 4 * g.count);
    }
}

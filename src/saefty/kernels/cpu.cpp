// Sparse arithmetic on the CPU. Plain C functions over raw pointers, called through ctypes, so that
// compiling needs neither torch's headers nor more than a second or two. Every sum is done by one
// thread in a fixed order: results do not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "sums.h"

namespace {

using Latent = int64_t;

inline uint32_t bits_of(float number) {
    uint32_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    return bits;
}

inline float number_of(uint32_t bits) {
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
}

// A positive number rounded to bfloat16 towards zero. As integers, positive bfloat16 numbers are in
// the same order, and negative ones below.
inline int16_t below(float positive) { return static_cast<int16_t>(bits_of(positive) >> 16); }

inline float widened(int16_t number) {
    return number_of(static_cast<uint32_t>(static_cast<uint16_t>(number)) << 16);
}

// What a rough number can be at least, of which the true one may be among the k largest, if k rough
// numbers reach `reached`; all of them may be off by `bound`, and by a rounding relative to them.
inline float lowest(float reached, float bound, float rounding) {
    return (reached * (1 - rounding) - 2 * bound) / (1 + rounding);
}

// The k-th largest of n numbers (k <= n); the numbers change places.
template <typename Number>
Number kth_largest(Number* numbers, int64_t n, int64_t k) {
    std::nth_element(numbers, numbers + (k - 1), numbers + n, std::greater<Number>());
    return numbers[k - 1];
}

// Maxima of groups of `members` numbers: group g holds the numbers g, g + groups, g + 2 groups, …
template <typename Number>
void group_maxima(const Number* numbers, int64_t groups, int64_t members, Number* maxima) {
    std::copy(numbers, numbers + groups, maxima);
    for (int64_t m = 1; m < members; ++m) {
        const Number* slice = numbers + m * groups;
#pragma omp simd
        for (int64_t g = 0; g < groups; ++g) maxima[g] = std::max(maxima[g], slice[g]);
    }
}

// The k-th largest among maxima joined `coarser` at a time: at least k numbers are that large.
template <typename Number>
Number reached_by_k(const Number* maxima, int64_t groups, int64_t coarser, int64_t k, Number* scratch) {
    const int64_t joined = groups / coarser;
    group_maxima(maxima, joined, coarser, scratch);
    return kth_largest(scratch, joined, k);
}

// Calls found(column) for every number that is at least `least`, by ascending group.
template <typename Number, typename Found>
void at_least(const Number* numbers, const Number* maxima, int64_t groups, int64_t members,
              Number least, Found found) {
    constexpr int64_t block = 64;
    for (int64_t start = 0; start < groups; start += block) {
        const int64_t stop = std::min(start + block, groups);
        bool any = false;
#pragma omp simd reduction(| : any)
        for (int64_t g = start; g < stop; ++g) any |= maxima[g] >= least;
        if (!any) continue;
        for (int64_t g = start; g < stop; ++g) {
            if (!(maxima[g] >= least)) continue;
            for (int64_t m = 0; m < members; ++m)
                if (numbers[m * groups + g] >= least) found(m * groups + g);
        }
    }
}

void write_largest(std::vector<Candidate>& found, int64_t k, float* values, Latent* latents) {
    const int64_t n = std::min<int64_t>(k, found.size());
    std::partial_sort(found.begin(), found.begin() + n, found.end(), precedes);
    for (int64_t j = 0; j < n; ++j) {
        values[j] = found[j].value;
        latents[j] = found[j].latent;
    }
    for (int64_t j = n; j < k; ++j) {
        values[j] = 0.0f;
        latents[j] = 0;
    }
}

}  // namespace

extern "C" {

// Which latents can be among the k largest of each row, given rough pre-activations in bfloat16 and
// how far these can be off: candidates[row * most], counts[row]. Rows of which the rough numbers
// decide too little get the count -1.
void screen(const int16_t* rough, const float* bounds, int64_t rows, int64_t d_sae,
            int64_t members, int64_t coarser, int64_t k, int64_t most, float rounding,
            int32_t* candidates, int32_t* counts) {
    const int64_t groups = d_sae / members;
#pragma omp parallel
    {
        std::vector<int16_t> maxima(groups), scratch(std::max(groups / coarser, most));
        std::vector<int32_t> found(most);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) {
            const int16_t* pre = rough + row * d_sae;
            group_maxima(pre, groups, members, maxima.data());
            int16_t reached = reached_by_k(maxima.data(), groups, coarser, k, scratch.data());
            counts[row] = -1;
            float floor = lowest(widened(reached), bounds[row], rounding);
            if (!(floor > 0 && floor < std::numeric_limits<float>::infinity())) continue;
            int64_t n = 0;
            const int16_t least = below(floor);
            at_least(pre, maxima.data(), groups, members, least, [&](int64_t latent) {
                if (n < most) found[n] = static_cast<int32_t>(latent);
                ++n;
            });
            if (n > most) continue;
            // The k-th largest of all is among them, and lies above what the maxima reached.
            for (int64_t i = 0; i < n; ++i) scratch[i] = pre[found[i]];
            reached = kth_largest(scratch.data(), n, k);
            const int16_t tighter = below(lowest(widened(reached), bounds[row], rounding));
            int32_t* kept = candidates + row * most;
            int32_t count = 0;
            for (int64_t i = 0; i < n; ++i)
                if (pre[found[i]] >= tighter) kept[count++] = found[i];
            counts[row] = count;
        }
    }
}

// The k largest of each row among its candidates, by pre-activations in float32. A row whose count
// is -1 is left alone.
void rescore(const float* x, const float* W, const float* b, const int32_t* candidates,
             const int32_t* counts, int64_t rows, int64_t d_in, int64_t d_sae, int64_t most,
             int64_t k, float* values, Latent* latents) {
    // Latent by latent, because the rows stay in cache and the weights do not.
    std::vector<int64_t> starts(d_sae + 1, 0);
    for (int64_t row = 0; row < rows; ++row)
        for (int32_t c = 0; c < counts[row]; ++c) ++starts[candidates[row * most + c] + 1];
    for (int64_t i = 0; i < d_sae; ++i) starts[i + 1] += starts[i];
    std::vector<int64_t> places(starts[d_sae]), next(starts.begin(), starts.end() - 1);
    for (int64_t row = 0; row < rows; ++row)
        for (int32_t c = 0; c < counts[row]; ++c)
            places[next[candidates[row * most + c]]++] = row * most + c;
    std::vector<float> scores(rows * most);
#pragma omp parallel
    {
#pragma omp for schedule(dynamic, 256)
        for (int64_t i = 0; i < d_sae; ++i)
            for (int64_t p = starts[i]; p < starts[i + 1]; ++p)
                scores[places[p]] = dot(x + static_cast<uint32_t>(places[p]) / static_cast<uint32_t>(most) * d_in, W + i * d_in, d_in) + b[i];
        std::vector<Candidate> found;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) {
            if (counts[row] < 0) continue;
            found.clear();
            for (int64_t c = row * most; c < row * most + counts[row]; ++c)
                found.push_back({scores[c], candidates[c]});
            write_largest(found, k, values + row * k, latents + row * k);
        }
    }
}

// The k largest positive numbers of each row, given all of them. A row that holds a NaN is left
// alone, and strange[row] is set.
void topk(const float* pre, int64_t rows, int64_t d_sae, int64_t members, int64_t coarser,
          int64_t k, float* values, Latent* latents, uint8_t* strange) {
    const int64_t groups = d_sae / members;
#pragma omp parallel
    {
        std::vector<float> maxima(groups), scratch(groups / coarser);
        std::vector<Candidate> found;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) {
            const float* numbers = pre + row * d_sae;
            int nan = 0;
#pragma omp simd reduction(| : nan)
            for (int64_t i = 0; i < d_sae; ++i) nan |= numbers[i] != numbers[i];
            strange[row] = nan != 0;
            if (nan) continue;
            group_maxima(numbers, groups, members, maxima.data());
            const float reached = reached_by_k(maxima.data(), groups, coarser, k, scratch.data());
            const float least = std::max(reached, std::numeric_limits<float>::denorm_min());
            found.clear();
            at_least(numbers, maxima.data(), groups, members, least, [&](int64_t latent) {
                found.push_back({numbers[latent], static_cast<int32_t>(latent)});
            });
            write_largest(found, k, values + row * k, latents + row * k);
        }
    }
}

// Weights rounded to bfloat16 (to the nearest, ties to even), the squared length of each row, and
// that of what rounding took from it.
void rounded(const float* W, int64_t rows, int64_t d, int16_t* rough, float* squared, float* lost) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const float* from = W + row * d;
        int16_t* to = rough + row * d;
        float length = 0.0f, missing = 0.0f;
#pragma omp simd reduction(+ : length, missing)
        for (int64_t i = 0; i < d; ++i) {
            const uint32_t bits = bits_of(from[i]);
            const uint32_t upper = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
            to[i] = static_cast<int16_t>(upper >> 16);
            const float gone = from[i] - number_of(upper);
            length += from[i] * from[i];
            missing += gone * gone;
        }
        squared[row] = length;
        lost[row] = missing;
    }
}

// Row by row: error = z W_dec + b_dec - x, and error . W_dec[latent] for each of the row's entries,
// while the decoder rows are in cache.
void reconstruct(const float* values, const Latent* latents, const int64_t* offsets,
                 const float* W_dec, const float* b_dec, const float* x, int64_t rows, int64_t d,
                 float* error, float* dots) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        float* sum = error + row * d;
        const float* input = x + row * d;
#pragma omp simd
        for (int64_t i = 0; i < d; ++i) sum[i] = b_dec[i] - input[i];
        add_all(
            sum, offsets[row], offsets[row + 1], d,
            [&](int64_t e) { return W_dec + latents[e] * d; }, [&](int64_t e) { return values[e]; });
        for (int64_t e = offsets[row]; e < offsets[row + 1]; ++e)
            dots[e] = dot(sum, W_dec + latents[e] * d, d);
    }
}

// Entries sorted by latent, and by row within a latent: starts [d_sae + 1], order [nnz].
void by_latent(const Latent* latents, int64_t nnz, int64_t d_sae, int64_t* starts, int64_t* order) {
    std::fill(starts, starts + d_sae + 1, 0);
    for (int64_t e = 0; e < nnz; ++e) ++starts[latents[e] + 1];
    for (int64_t i = 0; i < d_sae; ++i) starts[i + 1] += starts[i];
    std::vector<int64_t> next(starts, starts + d_sae);
    for (int64_t e = 0; e < nnz; ++e) order[next[latents[e]]++] = e;
}

// Latent by latent, over its entries: grad_enc = sum of by_value * x, grad_dec = sum of value *
// scale * error, grad_bias = sum of by_value. With `tangent`, what of grad_dec is parallel to the
// unit row of W_dec is taken out. squared[latent] is the squared length of the three together.
void latent_gradients(const float* values, const float* by_value, const int64_t* row_of,
                      const int64_t* starts, const int64_t* order, const float* x,
                      const float* error, int64_t /* n_rows */, int64_t d_sae, int64_t d,
                      float scale, const float* W_dec, int64_t tangent, float* grad_enc,
                      float* grad_dec, float* grad_bias, float* squared) {
#pragma omp parallel for schedule(dynamic, 64)
    for (int64_t i = 0; i < d_sae; ++i) {
        float *enc = grad_enc + i * d, *dec = grad_dec + i * d;
        std::fill(enc, enc + d, 0.0f);
        std::fill(dec, dec + d, 0.0f);
        add_all(
            enc, starts[i], starts[i + 1], d, [&](int64_t p) { return x + row_of[order[p]] * d; },
            [&](int64_t p) { return by_value[order[p]]; });
        add_all(
            dec, starts[i], starts[i + 1], d,
            [&](int64_t p) { return error + row_of[order[p]] * d; },
            [&](int64_t p) { return values[order[p]] * scale; });
        float bias = 0.0f;
        for (int64_t p = starts[i]; p < starts[i + 1]; ++p) bias += by_value[order[p]];
        grad_bias[i] = bias;
        squared[i] = ended(enc, dec, bias, tangent ? W_dec + i * d : nullptr, d);
    }
}

// One step of AdamW (decoupled weight decay) on rows of weights; with `unit`, each row is brought
// back to length 1.
void adamw(float* weights, float* mean, float* power, const float* gradient, int64_t rows,
           int64_t d, float factor, float rate, float beta1, float beta2, float eps, float decay,
           float correction1, float correction2, int64_t unit) {
    const float size = rate / correction1, root = 1.0f / std::sqrt(correction2);
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        float *w = weights + row * d, *m = mean + row * d, *v = power + row * d;
        const float* g = gradient + row * d;
        float length = 0.0f;
#pragma omp simd reduction(+ : length)
        for (int64_t i = 0; i < d; ++i) {
            const float slope = g[i] * factor;
            m[i] += (slope - m[i]) * (1 - beta1);
            v[i] = beta2 * v[i] + (1 - beta2) * slope * slope;
            w[i] = w[i] * (1 - rate * decay) - size * m[i] / (std::sqrt(v[i]) * root + eps);
            length += w[i] * w[i];
        }
        if (!unit) continue;
        const float shorter = 1.0f / std::sqrt(length);
#pragma omp simd
        for (int64_t i = 0; i < d; ++i) w[i] *= shorter;
    }
}

}  // extern "C"

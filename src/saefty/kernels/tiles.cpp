// The k largest pre-activations of each row on processors with tile registers (Intel's AMX): the
// product in bfloat16 never leaves the cache, because what cannot be among the k largest is dropped
// where it is computed. Plain C functions, like those of cpu.cpp.

#include <cstdint>

#if defined(__AMX_BF16__) && defined(__AVX512F__) && defined(__linux__)

#include <immintrin.h>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "sums.h"

namespace {

using Latent = int64_t;

constexpr int64_t TILE = 16;          // rows of a tile, and float32 numbers in a row of it
constexpr int64_t SIDE = 2 * TILE;    // a product is computed that many rows and latents at a time
constexpr int64_t MOST_ROWS = 512;    // whose roundings and candidates stay in a core's cache
constexpr float INFINITE = std::numeric_limits<float>::infinity(), NONE = -INFINITE;

inline float tile_dot(const float* a, const float* b, int64_t d) {  // d is a multiple of 32
    __m512 even = _mm512_setzero_ps(), odd = even;
    for (int64_t i = 0; i < d; i += SIDE) {
        even = _mm512_fmadd_ps(_mm512_loadu_ps(a + i), _mm512_loadu_ps(b + i), even);
        odd = _mm512_fmadd_ps(_mm512_loadu_ps(a + i + TILE), _mm512_loadu_ps(b + i + TILE), odd);
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(even, odd));
}

// Rounds to bfloat16 (to the nearest, ties to even); squared lengths of all, and of what was lost.
inline void round_row(const float* from, int64_t d, int16_t* to, float& squared, float& lost) {
    float length = 0.0f, missing = 0.0f;
#pragma omp simd reduction(+ : length, missing)
    for (int64_t i = 0; i < d; ++i) {
        uint32_t bits;
        std::memcpy(&bits, from + i, sizeof bits);
        const uint32_t upper = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
        float kept;
        std::memcpy(&kept, &upper, sizeof kept);
        to[i] = static_cast<int16_t>(upper >> 16);
        length += from[i] * from[i];
        missing += (from[i] - kept) * (from[i] - kept);
    }
    squared = length;
    lost = missing;
}

// A row's rough pre-activations from `floor` on.
struct Row {
    int64_t number;
    float norm, bound, begun, floor, certain;
    int64_t n;
    float* values;
    int32_t* latents;

    void add(__mmask16 mask, __m512 found, __m512i names) {
        _mm512_storeu_ps(values + n, _mm512_maskz_compress_ps(mask, found));
        _mm512_storeu_si512(latents + n, _mm512_maskz_compress_epi32(mask, names));
        n += __builtin_popcount(mask);
    }

    // A number that at least k of those here reach, and hardly more (n >= k).
    float reached(int64_t k) const {
        float low = floor, high = floor;
#pragma omp simd reduction(max : high)
        for (int64_t i = 0; i < n; ++i) high = std::max(high, values[i]);
        for (int step = 0; step < 14; ++step) {
            const float middle = 0.5f * (low + high);
            int32_t count = 0;
#pragma omp simd reduction(+ : count)
            for (int64_t i = 0; i < n; ++i) count += values[i] >= middle;
            (count >= k ? low : high) = middle;
        }
        return low;
    }

    // Drops what cannot be among the k largest; returns what at least k of the others reach.
    float tighten(int64_t k) {
        if (n < k) return floor;
        const float least = reached(k);
        floor = std::max(floor, least - 2 * bound);
        const __m512 lowest = _mm512_set1_ps(floor);
        int64_t end = n;
        n = 0;
        for (int64_t i = 0; i < end; i += TILE) {
            const __mmask16 there = end - i >= TILE ? 0xffff : (1u << (end - i)) - 1;
            const __m512 found = _mm512_maskz_loadu_ps(there, values + i);
            const __m512i names = _mm512_maskz_loadu_epi32(there, latents + i);
            add(_mm512_mask_cmp_ps_mask(there, found, lowest, _CMP_GE_OQ), found, names);
        }
        return least;
    }

    void give_up() {
        n = 0;
        floor = INFINITE;
    }
};

struct alignas(64) Tiles {  // what the processor reads to shape its tile registers
    uint8_t palette = 1, first_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {TILE, TILE, TILE, TILE, TILE, TILE, TILE, TILE};
};

struct Encoder {
    const float *x, *W, *b;
    const int16_t* packed;
    int64_t d, d_sae, k, most;
    float longest, farthest, largest_bias, summing, vanished;
};

// One thread's part of the work.
class Worker {
   public:
    Worker(const Encoder& encoder, int64_t rows, float* values, Latent* latents, uint8_t* unsure)
        : e(encoder), room(e.most + SIDE + TILE), values(values), latents(latents), unsure(unsure),
          rounded(rows * e.d + SIDE), held(rows * room), exact(rows * room), names(rows * room),
          rows(rows) {
        const auto at = reinterpret_cast<uintptr_t>(rounded.data());
        a = reinterpret_cast<int16_t*>((at + 63) / 64 * 64);
    }

    // Rows for which the floor they began with was too high come back in `again`.
    void work(const int64_t* numbers, int64_t n, std::vector<int64_t>& again) {
        begin(numbers, n);
        for (int64_t first = 0; first < e.d_sae; first += SIDE)
            for (int64_t r = 0; r < n; r += SIDE) {
                multiply(a + r * e.d, first);
                collect(rows.data() + r, std::min(SIDE, n - r), first);
            }
        finish(n, again);
        scratch.clear();
        for (int64_t r : sure)
            if (rows[r].norm > 0) scratch.push_back(rows[r].floor / rows[r].norm);
        if (guess != NONE || scratch.empty()) return;
        const auto low = scratch.begin() + scratch.size() / 64;
        std::nth_element(scratch.begin(), low, scratch.end());
        guess = std::max(0.0f, 0.9f * *low);
    }

    // Where rows begin, relative to their norms; else at all that is positive.
    float guess = NONE;

   private:
    void begin(const int64_t* numbers, int64_t n) {
        for (int64_t r = 0; r < n; ++r) {
            float squared, lost;
            round_row(e.x + numbers[r] * e.d, e.d, a + r * e.d, squared, lost);
            const float norm = std::sqrt(squared) + e.vanished, gone = std::sqrt(lost) + e.vanished;
            // What rounding the sums does counts for both products; 0.01 % is for the norms' own.
            const float bound = (gone * e.longest + (norm + gone) * e.farthest +
                                 (norm * e.longest + e.largest_bias) * e.summing * e.d) * 1.0001f;
            const bool known = bound < INFINITE;
            const float least = guess == NONE ? -bound : std::max(-bound, guess * norm);
            const float floor = known ? least : INFINITE;
            rows[r] = {numbers[r], norm, bound, floor, floor, floor, 0, &held[r * room], &names[r * room]};
            unsure[numbers[r]] = !known;
        }
        const int64_t whole = (n + SIDE - 1) / SIDE * SIDE;
        std::fill(a + n * e.d, a + whole * e.d, 0);
    }

    void multiply(const int16_t* left, int64_t first) {
        const int16_t *right = e.packed + first * e.d, *next = right + TILE * e.d;
        const int16_t* lower = left + TILE * e.d;
        const float* bias = e.b + first;  // a stride of 0 gives each row of a tile the same numbers
        _tile_loadd(0, bias, 0);
        _tile_loadd(1, bias + TILE, 0);
        _tile_loadd(2, bias, 0);
        _tile_loadd(3, bias + TILE, 0);
        for (int64_t i = 0; i < e.d; i += SIDE) {
            _tile_loadd(4, left + i, e.d * 2);
            _tile_loadd(6, right + i * TILE, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, next + i * TILE, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, lower + i, e.d * 2);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, square, SIDE * 4);
        _tile_stored(1, square + TILE, SIDE * 4);
        _tile_stored(2, square + TILE * SIDE, SIDE * 4);
        _tile_stored(3, square + TILE * SIDE + TILE, SIDE * 4);
    }

    void collect(Row* part, int64_t n, int64_t first) {
        const __m512i counting = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512i left = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(first)), counting);
        const __m512i right = _mm512_add_epi32(left, _mm512_set1_epi32(TILE));
        for (int64_t r = 0; r < n; ++r) {
            Row& row = part[r];
            const __m512 least = _mm512_set1_ps(row.floor);
            const __m512 one = _mm512_load_ps(square + r * SIDE);
            const __m512 two = _mm512_load_ps(square + r * SIDE + TILE);
            const __mmask16 in_one = _mm512_cmp_ps_mask(one, least, _CMP_GE_OQ);
            const __mmask16 in_two = _mm512_cmp_ps_mask(two, least, _CMP_GE_OQ);
            if (!(in_one | in_two)) continue;
            row.add(in_one, one, left);
            row.add(in_two, two, right);
            if (row.n <= e.most) continue;
            row.tighten(e.k);
            if (row.n <= e.most - SIDE) continue;
            unsure[row.number] = 1;
            row.give_up();
        }
    }

    // Whether a row's candidates hold its k largest for certain; one that began too high goes again.
    bool holds(Row& row, std::vector<int64_t>& again) {
        if (unsure[row.number]) return false;
        row.certain = row.tighten(e.k);
        const bool too_high = row.n < e.k || row.certain - 2 * row.bound < row.begun;
        if (!(too_high && row.begun > -row.bound)) return true;
        again.push_back(row.number);
        return false;
    }

    // Computes candidates anew. Those that reach what k rough numbers reach come first: once k exact
    // ones are known, a rough number below the least of them by more than its bound is out.
    void finish(int64_t n, std::vector<int64_t>& again) {
        sure.clear();
        for (int64_t r = 0; r < n; ++r)
            if (holds(rows[r], again)) sure.push_back(r);
        places.clear();
        for (int64_t r : sure)
            for (int64_t c = 0; c < rows[r].n; ++c) {
                exact[r * room + c] = -INFINITE;
                if (rows[r].values[c] >= rows[r].certain) places.push_back(r * room + c);
            }
        compute();
        places.clear();
        for (int64_t r : sure) {
            const Row& row = rows[r];
            if (row.n <= e.k) continue;
            scratch.assign(&exact[r * room], &exact[r * room] + row.n);
            std::nth_element(scratch.begin(), scratch.begin() + (e.k - 1), scratch.end(), std::greater<float>());
            const float least = scratch[e.k - 1] - row.bound;
            for (int64_t c = 0; c < row.n; ++c)
                if (row.values[c] < row.certain && row.values[c] >= least)
                    places.push_back(r * room + c);
        }
        compute();
        for (int64_t r : sure) write(rows[r], &exact[r * room]);
    }

    // The exact values of candidates, by latent: the rows are in cache, and the weights are not.
    void compute() {
        starts.assign(e.d_sae + 1, 0);
        for (int32_t place : places) ++starts[names[place] + 1];
        for (int64_t i = 0; i < e.d_sae; ++i) starts[i + 1] += starts[i];
        order.resize(places.size());
        for (int32_t place : places) order[starts[names[place]]++] = place;
        for (int32_t place : order) {
            const float *row = e.x + rows[place / room].number * e.d, *W = e.W + names[place] * e.d;
            exact[place] = tile_dot(row, W, e.d) + e.b[names[place]];
        }
    }

    void write(const Row& row, const float* scores) {
        found.clear();
        for (int64_t c = 0; c < row.n; ++c)
            if (scores[c] > -INFINITE) found.push_back({scores[c], row.latents[c]});
        const int64_t n = std::min<int64_t>(e.k, found.size());
        std::partial_sort(found.begin(), found.begin() + n, found.end(), precedes);
        found.resize(e.k, {0.0f, 0});
        for (int64_t j = 0; j < e.k; ++j) {
            values[row.number * e.k + j] = found[j].value;
            latents[row.number * e.k + j] = found[j].latent;
        }
    }

    const Encoder& e;
    int64_t room;
    float* values;
    Latent* latents;
    uint8_t* unsure;
    std::vector<int16_t> rounded;
    std::vector<float> held, exact, scratch;
    std::vector<int32_t> names, places, order, starts;
    std::vector<int64_t> sure;
    std::vector<Row> rows;
    std::vector<Candidate> found;
    int16_t* a;
    alignas(64) float square[SIDE * SIDE];
};

}  // namespace

extern "C" {

// Asks the system for the tile registers; 0 if there are none.
int64_t tiles_ready() {
    constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, request, tile_data) == 0;
}

// Weights rounded to bfloat16 in the order in which tiles take them (16 latents side by side, pairs
// of inputs below each other), the squared length of each row, and that of what rounding lost.
void packed(const float* W, int64_t d_sae, int64_t d, int16_t* packed, float* squared, float* lost) {
#pragma omp parallel
    {
        std::vector<int16_t> rough(TILE * d);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < d_sae; i += TILE) {
            for (int64_t n = 0; n < TILE; ++n)
                round_row(W + (i + n) * d, d, &rough[n * d], squared[i + n], lost[i + n]);
            int16_t* to = packed + i * d;
            for (int64_t pair = 0; pair < d; pair += 2)
                for (int64_t n = 0; n < TILE; ++n, to += 2)
                    std::memcpy(to, &rough[n * d + pair], 2 * sizeof *to);
        }
    }
}

// The k largest of each row by float32 pre-activations, of equal ones the lower latent first. d and
// d_sae are multiples of 32. A row of which the bfloat16 product decides too little, or that is not
// finite, is left alone, and unsure[row] is set.
void tile_topk(const float* x, const float* W, const int16_t* packed, const float* b, int64_t n_rows,
               int64_t d, int64_t d_sae, int64_t k, int64_t most, float longest, float farthest,
               float largest_bias, float summing, float vanished, float* values, Latent* latents,
               uint8_t* unsure) {
    const Encoder encoder{x,       W,        b,            packed,  d,       d_sae, k, most,
                          longest, farthest, largest_bias, summing, vanished};
    std::vector<int64_t> numbers(n_rows);
    for (int64_t row = 0; row < n_rows; ++row) numbers[row] = row;
#pragma omp parallel
    {
        Tiles before, mine;  // torch's own products find their tiles as they left them
        _tile_storeconfig(&before);
        _tile_loadconfig(&mine);
        const int64_t share = (n_rows / omp_get_num_threads() + SIDE - 1) / SIDE * SIDE;
        const int64_t size = std::min(MOST_ROWS, std::max(SIDE, share));
        Worker worker(encoder, size, values, latents, unsure);
        std::vector<int64_t> again, none;
#pragma omp for schedule(static) nowait
        for (int64_t first = 0; first < n_rows; first += size)
            worker.work(&numbers[first], std::min(size, n_rows - first), again);
        for (int64_t first = 0; first < static_cast<int64_t>(again.size()); first += size) {
            worker.guess = NONE;
            worker.work(&again[first], std::min<int64_t>(size, again.size() - first), none);
        }
        _tile_loadconfig(&before);
    }
}

}  // extern "C"

#else

extern "C" int64_t tiles_ready() { return 0; }

#endif

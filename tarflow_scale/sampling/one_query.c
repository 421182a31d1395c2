/* Attention of one token to itself and to all earlier tokens, whose keys and values are in a cache.

   Compiled for one HEAD_WIDTH and one precision of the cache, fp32 or (NARROW) bf16; sums are fp32. A thread computes
   one head of one row at a time and reads each key and each value once, in the order of memory. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#if NARROW /* a word holds two bf16 features; a mask or a shift turns either into a float */
typedef uint32_t word;
#define LANES 2

static inline float wide(word value, int lane) {
    const uint32_t bits = lane ? value & 0xffff0000 : value << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

static inline uint32_t narrow(float value) { /* to nearest even */
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return value != value ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

static inline word joined(const float *lanes) { return narrow(lanes[0]) | narrow(lanes[1]) << 16; }
#else
typedef float word;
#define LANES 1

static inline float wide(word value, int lane) {
    (void)lane;
    return value;
}

static inline word joined(const float *lanes) { return lanes[0]; }
#endif
#define WORDS (HEAD_WIDTH / LANES)

/* exp(x) for x <= 0 to 2 units in the last place, in a form that compilers vectorise: 2^n exp(r), |r| <= ln(2) / 2, with
   Taylor's polynomial. Below -87 the result is exp(-87), 1.6e-38; NaN stays NaN. */
static inline float exponential(float x) {
    const float magic = 0x1.8p23f; /* adding it rounds to an integer, which is in the lowest bits */
    const float clamped = x < -87.0f ? -87.0f : x, shifted = clamped * 0x1.715476p0f + magic, n = shifted - magic;
    const float r = (clamped - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
    float result = 1.0f / 5040;
    result = result * r + 1.0f / 720;
    result = result * r + 1.0f / 120;
    result = result * r + 1.0f / 24;
    result = result * r + 1.0f / 6;
    result = result * r + 0.5f;
    result = result * r + 1.0f;
    result = result * r + 1.0f;
    uint32_t power, bits;
    memcpy(&power, &shifted, sizeof power);
    memcpy(&bits, &result, sizeof bits);
    bits += power << 23;
    memcpy(&result, &bits, sizeof result);
    return result;
}

/* The features of a head as floats. Unless rotation is null, each pair (2 i, 2 i + 1) is rotated by the angle with cosine
   rotation[i] and sine rotation[HEAD_WIDTH / 2 + i]. */
static inline void read_head(const word *restrict head, const float *restrict rotation, float *restrict features) {
    for (int i = 0; i < WORDS; i++)
        for (int lane = 0; lane < LANES; lane++) features[i * LANES + lane] = wide(head[i], lane);
    if (!rotation) return;
    for (int i = 0; i < HEAD_WIDTH / 2; i++) {
        const float even = features[2 * i], odd = features[2 * i + 1];
        const float cosine = rotation[i], sine = rotation[HEAD_WIDTH / 2 + i];
        features[2 * i] = even * cosine - odd * sine;
        features[2 * i + 1] = even * sine + odd * cosine;
    }
}

/* qkv (rows, heads + 2 key_heads, HEAD_WIDTH): queries, keys, values; heads / key_heads queries share a key. keys and
   values (rows, key_heads, capacity, HEAD_WIDTH); out (rows, heads, HEAD_WIDTH). The token's own key, rotated, and value
   are stored at `position` first. sharpness: factor on the logits of each row, or null. rotation: see read_head. */
void one_query(const word *restrict qkv, word *restrict keys, word *restrict values, word *restrict out,
               const float *restrict sharpness, const float *restrict rotation, int64_t rows, int64_t heads,
               int64_t key_heads, int64_t capacity, int64_t position, int64_t threads) {
    const float scale = 1.0f / sqrtf(HEAD_WIDTH);
    const int64_t group = heads / key_heads;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t pair = 0; pair < rows * key_heads; pair++) {
        const int64_t row = pair / key_heads, key_head = pair % key_heads;
        const word *token_heads = qkv + row * (heads + 2 * key_heads) * WORDS;
        const word *own_key = token_heads + (heads + key_head) * WORDS;
        word *own_keys = keys + pair * capacity * WORDS, *own_values = values + pair * capacity * WORDS;
        float features[HEAD_WIDTH];
        if (rotation) {
            read_head(own_key, rotation, features);
            for (int i = 0; i < WORDS; i++) own_keys[position * WORDS + i] = joined(features + i * LANES);
        } else {
            memcpy(own_keys + position * WORDS, own_key, sizeof(word) * WORDS);
        }
        memcpy(own_values + position * WORDS, own_key + key_heads * WORDS, sizeof(word) * WORDS);

        for (int64_t head = key_head * group; head < (key_head + 1) * group; head++) {
            float q[LANES][WORDS], weights[position + 1], largest = -INFINITY, total = 0.0f;
            const float factor = sharpness ? scale * sharpness[row] : scale;
            read_head(token_heads + head * WORDS, rotation, features);
            for (int lane = 0; lane < LANES; lane++)
                for (int i = 0; i < WORDS; i++) q[lane][i] = features[i * LANES + lane] * factor;
            for (int64_t token = 0; token <= position; token++) {
                const word *key = own_keys + token * WORDS;
                float logit = 0.0f;
#pragma omp simd reduction(+ : logit)
                for (int i = 0; i < WORDS; i++)
                    for (int lane = 0; lane < LANES; lane++) logit += q[lane][i] * wide(key[i], lane);
                weights[token] = logit;
                largest = logit > largest ? logit : largest;
            }
#pragma omp simd reduction(+ : total)
            for (int64_t token = 0; token <= position; token++) {
                weights[token] = exponential(weights[token] - largest);
                total += weights[token];
            }
            float sum[LANES][WORDS] = {{0}};
            for (int64_t token = 0; token <= position; token++) {
                const word *value = own_values + token * WORDS;
                const float weight = weights[token];
                for (int lane = 0; lane < LANES; lane++)
#pragma omp simd
                    for (int i = 0; i < WORDS; i++) sum[lane][i] += weight * wide(value[i], lane);
            }
            word *own_out = out + (row * heads + head) * WORDS;
            for (int i = 0; i < WORDS; i++) {
                float divided[LANES];
                for (int lane = 0; lane < LANES; lane++) divided[lane] = sum[lane][i] / total;
                own_out[i] = joined(divided);
            }
        }
    }
}

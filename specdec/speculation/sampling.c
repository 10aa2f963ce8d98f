/* Drawing a token: the largest of its score and its Gumbel noise. Noise is made only where it can decide. */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "../runtimes/native/gumbel.h"

#ifdef _WIN32
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

enum {
    MOST_NOISE = 23, /* more than the largest noise, -log(-log1p(-0.5 * 2^-31)) = 22.2 */
    GROUP = 4 * NOISE_BLOCK, /* tokens that are looked at together */
};

/* The largest of GROUP scores. `bad` becomes 1 if one is NaN or infinite. */
static inline float largest(const float *scores, int *bad) {
    float high[NOISE_BLOCK];
    int wrong[NOISE_BLOCK] = {0};
    memcpy(high, scores, sizeof high);
    for (int i = 0; i < GROUP; i += NOISE_BLOCK)
        for (int j = 0; j < NOISE_BLOCK; j++) {
            high[j] = scores[i + j] > high[j] ? scores[i + j] : high[j];
            wrong[j] |= !(scores[i + j] <= FLT_MAX);
        }
    for (int j = 0; j < NOISE_BLOCK; j++) *bad |= wrong[j], high[0] = high[j] > high[0] ? high[j] : high[0];
    return high[0];
}

/* The first of the largest of scores [count] plus noise; -1 if the largest score is not finite, or one is NaN. */
EXPORT int64_t specdec_choose(const float *scores, int64_t count, uint64_t seed, uint64_t stream, int64_t position) {
    const int64_t whole = count - count % GROUP;
    float last[GROUP], top = -INFINITY;
    int bad = 0;
    for (int j = 0; j < GROUP; j++) last[j] = whole + j < count ? scores[whole + j] : -INFINITY;
    for (int64_t begin = 0; begin <= whole; begin += GROUP) {
        const float here = largest(begin < whole ? scores + begin : last, &bad);
        top = here > top ? here : top;
    }
    if (bad || !(top >= -FLT_MAX)) return -1;
    int64_t best = 0; /* to begin with the likeliest leaves little else */
    while (scores[best] != top) best++;
    float most = gumbel(seed, stream, position, best);
    uint32_t below[MOST_NOISE]; /* noise of more bits than below[n] is less than n: P(noise > n) < e^-n */
    for (int n = 0; n < MOST_NOISE; n++) below[n] = (uint32_t)fmin(ceil(exp(-n) * 0x1p31 * 1.001) + 1, 0x1p31);

    for (int64_t begin = 0; begin <= whole; begin += GROUP) {
        const float *own = begin < whole ? scores + begin : last;
        const float needed = most - (largest(own, &bad) - top); /* noise with which the likeliest of them wins */
        if (!(needed < MOST_NOISE)) continue;
        uint32_t bits[GROUP];
        for (int j = 0; j < GROUP; j += NOISE_BLOCK)
            noise_bits(seed, stream, position, (begin + j) / NOISE_BLOCK, bits + j);
        uint32_t least = UINT32_MAX;
        for (int j = 0; j < GROUP; j++) least = bits[j] < least ? bits[j] : least;
        const uint32_t some = needed >= 1 ? below[(int)needed] : UINT32_MAX;
        if (least > some) continue;
        for (int j = 0; j < GROUP; j++) {
            if (bits[j] > some) continue;
            const float noisy = own[j] - top + gumbel_of(bits[j]);
            if (noisy > most || (noisy == most && begin + j < best)) most = noisy, best = begin + j;
        }
    }
    return best;
}

/* Top-p; and drawing a token: the largest of its score and its Gumbel noise. Exponentials and noise are computed where they can decide. */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
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
    NEAR = 10, /* top-p usually ends within so much of the largest score */
    DEEPEST = 40, /* scores further below it have no part in a sum of probabilities: a million of them, 4e-12 */
};

typedef struct { /* the scores of one position */
    const float *scores;
    int64_t whole;     /* number of tokens in whole groups */
    float last[GROUP]; /* the scores of the tokens after them, then -inf */
    int64_t groups;
    float *high;       /* [groups]: the largest score of each group */
    float top;         /* the largest score; NaN: it is not finite, or a score is NaN */
} Scores;

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

static const float *group_of(const Scores *s, int64_t group) { return GROUP * group < s->whole ? s->scores + GROUP * group : s->last; }

/* Set *s. Returns 0, or -1 without memory; free(s->high). */
static int look_at(const float *scores, int64_t count, Scores *s) {
    int bad = 0;
    *s = (Scores){scores, count - count % GROUP, {0}, count / GROUP + 1, NULL, -INFINITY};
    for (int j = 0; j < GROUP; j++) s->last[j] = s->whole + j < count ? scores[s->whole + j] : -INFINITY;
    if (!(s->high = malloc(sizeof *s->high * (size_t)s->groups))) return -1;
    for (int64_t i = 0; i < s->groups; i++) {
        s->high[i] = largest(group_of(s, i), &bad);
        s->top = s->high[i] > s->top ? s->high[i] : s->top;
    }
    if (bad || !(s->top >= -FLT_MAX)) s->top = NAN;
    return 0;
}

/* to[GROUP] = e to (scores - top) of scores up to `top`; e to -DEEPEST of those further below. */
static inline void weights_of(const float *scores, float top, float *to) {
    const float least = -DEEPEST;
    int32_t bits[GROUP];
    float power[GROUP], below[GROUP];
    for (int j = 0; j < GROUP; j++) below[j] = scores[j] - top;
    for (int j = 0; j < GROUP; j++) below[j] = below[j] > least ? below[j] : least;
    for (int j = 0; j < GROUP; j++) {
        const float exponent = below[j] * 1.44269504f;
        const int32_t whole = (int32_t)(exponent - 0.5f); /* to nearest, for negative numbers */
        const float x = (exponent - (float)whole) * 0.69314718f;
        to[j] = 1 + x * (1 + x * (0.5f + x * (1 / 6.0f + x * (1 / 24.0f + x * (1 / 120.0f + x * (1 / 720.0f + x / 5040))))));
        bits[j] = (int32_t)((uint32_t)(whole + 127) << 23);
    }
    memcpy(power, bits, sizeof power);
    for (int j = 0; j < GROUP; j++) to[j] *= power[j];
}

typedef struct { float score, weight; } Candidate;

/* The score of the last of the candidates [count], likeliest first, before which there is less weight than `enough`. */
static float last_within(Candidate *own, int64_t count, double enough) {
    float last = -INFINITY;
    while (count > 0 && enough > 0) {
        const float a = own[0].score, b = own[count / 2].score, c = own[count - 1].score;
        const float pivot = a < b ? (b < c ? b : a < c ? c : a) : (a < c ? a : b < c ? c : b); /* the median */
        double above = 0, equal = 0;
        int64_t more = 0, less = count;
        for (int64_t i = 0; i < less;) {
            const Candidate each = own[i];
            if (each.score > pivot) above += each.weight, own[i++] = own[more], own[more++] = each;
            else if (each.score < pivot) own[i] = own[--less], own[less] = each;
            else equal += each.weight, i++;
        }
        if (above >= enough) count = more;
        else last = pivot, enough -= above + equal, own += less, count -= less;
    }
    return last;
}

/* The weight of all scores; and the candidates: scores less than `deepest` below the largest one, their number and weight. */
static double weigh(const Scores *s, int deepest, Candidate *candidates, int64_t *found, double *near) {
    float weights[GROUP], sum[NOISE_BLOCK];
    double total[NOISE_BLOCK] = {0};
    *found = 0, *near = 0;
    for (int64_t i = 0; i < s->groups; i++) {
        if (s->top - s->high[i] >= DEEPEST) continue;
        const float *own = group_of(s, i);
        weights_of(own, s->top, weights);
        memcpy(sum, weights, sizeof sum);
        for (int j = NOISE_BLOCK; j < GROUP; j++) sum[j % NOISE_BLOCK] += weights[j];
        for (int j = 0; j < NOISE_BLOCK; j++) total[j] += sum[j];
        for (int j = 0; s->top - s->high[i] < deepest && j < GROUP; j++)
            if (s->top - own[j] < deepest) *near += weights[j], candidates[(*found)++] = (Candidate){own[j], weights[j]};
    }
    for (int j = 1; j < NOISE_BLOCK; j++) total[0] += total[j];
    return total[0];
}

/* The least score that top-p keeps, with memory for all candidates. */
static float least_kept(const Scores *s, double top_p, Candidate *candidates) {
    int64_t found;
    double near, enough = top_p * weigh(s, NEAR, candidates, &found, &near);
    if (near < enough) enough = top_p * weigh(s, DEEPEST, candidates, &found, &near);
    return last_within(candidates, found, enough);
}

/* kept[count] = the scores of the likeliest tokens before which there is less probability than top_p, and -inf for the others. Scores
 * whose largest is not finite, or of which one is NaN, are copied. Returns 0, or -1 without memory. */
EXPORT int specdec_top_p(const float *scores, int64_t count, double top_p, float *kept) {
    Scores s;
    if (look_at(scores, count, &s)) return -1;
    Candidate *candidates = malloc(sizeof *candidates * (size_t)(GROUP * s.groups));
    const float least = candidates && s.top == s.top ? least_kept(&s, top_p, candidates) : -INFINITY;
    const int failed = !candidates;
    free(s.high), free(candidates);
    if (s.top != s.top) memcpy(kept, scores, sizeof *kept * (size_t)count);
    else
        for (int64_t i = 0; i < count; i++) kept[i] = scores[i] >= least ? scores[i] : -INFINITY;
    return -failed;
}

/* The first of the largest of scores [count] plus noise; -1 if the largest score is not finite, or one is NaN; -2 without memory. */
EXPORT int64_t specdec_choose(const float *scores, int64_t count, uint64_t seed, uint64_t stream, int64_t position) {
    Scores s;
    if (look_at(scores, count, &s)) return -2;
    const float top = s.top;
    if (top != top) return free(s.high), -1;
    int64_t best = 0; /* to begin with the likeliest leaves little else */
    while (scores[best] != top) best++;
    float most = gumbel(seed, stream, position, best);
    uint32_t below[MOST_NOISE]; /* noise of more bits than below[n] is less than n: P(noise > n) < e^-n */
    for (int n = 0; n < MOST_NOISE; n++) below[n] = (uint32_t)fmin(ceil(exp(-n) * 0x1p31 * 1.001) + 1, 0x1p31);

    for (int64_t i = 0; i < s.groups; i++) {
        const float *own = group_of(&s, i), needed = most - (s.high[i] - top); /* needed: noise with which the likeliest of them wins */
        const int64_t begin = GROUP * i;
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
    free(s.high);
    return best;
}

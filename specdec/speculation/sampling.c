/* Top-k, top-p, and drawing a token: the largest of its score and its Gumbel noise. Exponentials and noise are computed where they can decide. */
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

/* Built for wider vectors, too, with the same bits (setup.py: no contraction of products and sums). */
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLONES
#endif

enum {
    MOST_NOISE = 23, /* more than the largest noise, -log(-log1p(-0.5 * 2^-31)) = 22.2 */
    GROUP = 4 * NOISE_BLOCK, /* tokens that are looked at together */
    NEAR = 10, /* top-p usually ends within so much of the largest score */
    MIDDLE = 14, /* probabilities of groups further below it are only bounded at first */
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

static const float *group_of(const Scores *s, int64_t group) { return GROUP * group < s->whole ? s->scores + GROUP * group : s->last; }

/* Set *s, whose `high` has room for all groups (high_of). */
CLONES static void look_at(const float *scores, int64_t count, float *high, Scores *s) {
    int32_t bad[GROUP] = {0}, any = 0;
    *s = (Scores){scores, count - count % GROUP, {0}, count / GROUP + 1, high, -INFINITY};
    for (int j = 0; j < GROUP; j++) s->last[j] = s->whole + j < count ? scores[s->whole + j] : -INFINITY;
    for (int64_t i = s->groups; i % GROUP; i++) high[i] = -INFINITY;
    for (int64_t i = 0; i < s->groups; i++) {
        float most[GROUP];
        memcpy(most, group_of(s, i), sizeof most);
        for (int j = 0; j < GROUP; j++) bad[j] |= !(most[j] <= FLT_MAX);
        for (int j = 0; j < GROUP / 2; j++) most[j] = most[j] > most[j + GROUP / 2] ? most[j] : most[j + GROUP / 2];
        for (int j = 0; j < GROUP / 4; j++) most[j] = most[j] > most[j + GROUP / 4] ? most[j] : most[j + GROUP / 4];
        for (int j = 1; j < GROUP / 4; j++) most[0] = most[0] > most[j] ? most[0] : most[j];
        high[i] = most[0];
        s->top = high[i] > s->top ? high[i] : s->top;
    }
    for (int j = 0; j < GROUP; j++) any |= bad[j];
    if (any || !(s->top >= -FLT_MAX)) s->top = NAN;
}

/* Memory for the largest score of each group of `count`, up to a multiple of GROUP groups; NULL without memory. */
static float *high_of(int64_t count) { return malloc(sizeof(float) * (size_t)(count / GROUP + GROUP + 1)); }

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

/* The weight of the scores of groups whose largest is less than `depth` below the largest of all; and the candidates: scores less than
 * `deepest` below it, their number and weight. */
CLONES static double weigh(const Scores *s, int depth, int deepest, Candidate *candidates, int64_t *found, double *near) {
    float weights[GROUP], sum[NOISE_BLOCK];
    double total[NOISE_BLOCK] = {0};
    *found = 0, *near = 0;
    for (int64_t i = 0; i < s->groups; i++) {
        if (s->top - s->high[i] >= depth) continue;
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

/* An upper bound of the weight of the groups that weigh() leaves out at this `depth`. */
static double most_beyond(const Scores *s, int depth) {
    float weights[GROUP];
    double total = 0;
    for (int64_t i = 0; i < s->groups; i += GROUP) {
        weights_of(s->high + i, s->top, weights);
        for (int j = 0; j < GROUP && i + j < s->groups; j++) total += s->top - s->high[i + j] >= depth ? weights[j] : 0;
    }
    return 1.0001 * GROUP * total;
}

/* The least score that top-p keeps, with memory for all candidates. If two bounds of the weight of all scores select the same one, so
 * does that weight. */
static float least_kept(const Scores *s, double top_p, Candidate *candidates) {
    int64_t found;
    double near;
    const double least = weigh(s, MIDDLE, NEAR, candidates, &found, &near), most = least + most_beyond(s, MIDDLE);
    if (near >= top_p * most) {
        const float last = last_within(candidates, found, top_p * least);
        if (last == last_within(candidates, found, top_p * most)) return last;
    }
    double enough = top_p * weigh(s, DEEPEST, NEAR, candidates, &found, &near);
    if (near < enough) enough = top_p * weigh(s, DEEPEST, DEEPEST, candidates, &found, &near);
    return last_within(candidates, found, enough);
}

/* The `k`-th largest of the scores, with memory for all candidates; -inf if there are fewer. */
static float kth_largest(const Scores *s, int64_t k, Candidate *candidates) {
    int64_t found = s->groups;
    for (int64_t i = 0; i < found; i++) candidates[i] = (Candidate){s->high[i], 1};
    const float bound = k <= found ? last_within(candidates, found, (double)k) : -INFINITY;
    found = 0;
    for (int64_t i = 0; i < s->groups; i++)
        for (int j = 0; s->high[i] >= bound && j < GROUP; j++)
            if (group_of(s, i)[j] >= bound) candidates[found++] = (Candidate){group_of(s, i)[j], 1};
    return k <= found ? last_within(candidates, found, (double)k) : -INFINITY;
}

/* kept[count] = the scores of the likeliest tokens before which there is less probability than top_p, and -inf for the others. Scores
 * whose largest is not finite, or of which one is NaN, are copied. Returns 0, or -1 without memory. */
EXPORT int specdec_top_p(const float *scores, int64_t count, double top_p, float *kept) {
    Scores s;
    float *high = high_of(count);
    Candidate *candidates = malloc(sizeof *candidates * (size_t)(count + GROUP));
    const int failed = !high || !candidates;
    if (!failed) {
        look_at(scores, count, high, &s);
        const float least = s.top == s.top ? least_kept(&s, top_p, candidates) : -INFINITY;
        if (s.top != s.top) memcpy(kept, scores, sizeof *kept * (size_t)count);
        else
            for (int64_t i = 0; i < count; i++) kept[i] = scores[i] >= least ? scores[i] : -INFINITY;
    }
    free(high), free(candidates);
    return -failed;
}

/* The first of the largest of the scores plus noise, of those that are not below `least`; -1 if the largest score is not finite, or one is NaN. */
CLONES static int64_t choose(const Scores *s, float least, uint64_t seed, uint64_t stream, int64_t position) {
    const float top = s->top;
    if (top != top) return -1;
    int64_t best = 0; /* to begin with the likeliest leaves little else */
    while (s->high[best] != top) best++;
    for (best *= GROUP; group_of(s, best / GROUP)[best % GROUP] != top;) best++;
    float most = gumbel(seed, stream, position, best);
    uint32_t below[MOST_NOISE]; /* noise of more bits than below[n] is less than n: P(noise > n) < e^-n */
    for (int n = 0; n < MOST_NOISE; n++) below[n] = (uint32_t)fmin(ceil(exp(-n) * 0x1p31 * 1.001) + 1, 0x1p31);

    for (int64_t i = 0; i < s->groups; i++) {
        const float *own = group_of(s, i), needed = most - (s->high[i] - top); /* needed: noise with which the likeliest of them wins */
        const int64_t begin = GROUP * i;
        if (s->high[i] < least || !(needed < MOST_NOISE)) continue;
        uint32_t bits[GROUP];
        for (int j = 0; j < GROUP; j += NOISE_BLOCK)
            noise_bits(seed, stream, position, (begin + j) / NOISE_BLOCK, bits + j);
        uint32_t fewest = UINT32_MAX;
        for (int j = 0; j < GROUP; j++) fewest = bits[j] < fewest ? bits[j] : fewest;
        const uint32_t some = needed >= 1 ? below[(int)needed] : UINT32_MAX;
        if (fewest > some) continue;
        for (int j = 0; j < GROUP; j++) {
            if (bits[j] > some || own[j] < least) continue;
            const float noisy = own[j] - top + gumbel_of(bits[j]);
            if (noisy > most || (noisy == most && begin + j < best)) most = noisy, best = begin + j;
        }
    }
    return best;
}

CLONES static void divide(const void *restrict logits, int is_float, int64_t count, float temperature, float *restrict scores) {
    const float *floats = logits;
    const uint16_t *halves = logits;
    if (is_float)
        for (int64_t i = 0; i < count; i++) scores[i] = floats[i] / temperature;
    else
        for (int64_t i = 0; i < count; i++) {
            union { uint32_t bits; float value; } logit = {(uint32_t)halves[i] << 16};
            scores[i] = logit.value / temperature;
        }
}

/* choose() of logits [count], bf16 or float, divided by `temperature`, after top-k (0: all) and top-p; -2 without memory. */
EXPORT int64_t specdec_draw(const void *logits, int is_float, int64_t count, float temperature, int64_t top_k, double top_p, uint64_t seed,
    uint64_t stream, int64_t position) {
    Scores s;
    float *high = high_of(count), *scores = malloc(sizeof *scores * (size_t)count), least = -INFINITY;
    Candidate *candidates = malloc(sizeof *candidates * (size_t)(count + GROUP));
    int64_t chosen = -2;
    if (high && scores && candidates) {
        divide(logits, is_float, count, temperature, scores);
        look_at(scores, count, high, &s);
        if (s.top == s.top && top_k && top_k < count) {
            least = kth_largest(&s, top_k, candidates);
            for (int64_t i = 0; i < count; i++) scores[i] = scores[i] >= least ? scores[i] : -INFINITY;
            look_at(scores, count, high, &s);
        }
        if (s.top == s.top && top_p < 1) least = least_kept(&s, top_p, candidates);
        chosen = choose(&s, least, seed, stream, position);
    }
    free(high), free(scores), free(candidates);
    return chosen;
}

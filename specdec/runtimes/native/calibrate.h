/* Calibrated probabilities: how often candidates of a source are accepted, by how likely it says they are. */
#ifndef SPECDEC_CALIBRATE_H
#define SPECDEC_CALIBRATE_H

enum { LOWEST = -4, KNOTS = 11 }; /* a table has the probabilities at log-odds LOWEST, LOWEST + 1, .. */

/* The calibrated probability of what a source gives `p`; table: NULL: `p` itself. */
static inline float calibrated(const float *table, float p) {
    if (!table || !(p > 0)) return p > 0 ? p : 0;
    const float least = 0.017986f; /* the probability at LOWEST */
    if (p <= least) return p / least * table[0];
    float at = (p < 0.9999f ? __builtin_logf(p / (1 - p)) : 16.0f) - LOWEST;
    if (at >= KNOTS - 1) return table[KNOTS - 1];
    const int below = (int)at;
    at -= (float)below;
    return table[below] + at * (table[below + 1] - table[below]);
}

/* Let the likeliest of candidates keep its probability, and the others share what it leaves. */
static inline void share(float *p, int count) {
    float sum = 0;
    int best = 0;
    for (int i = 0; i < count; i++) sum += p[i], best = p[i] > p[best] ? i : best;
    for (int i = 0; i < count && sum > 1; i++)
        if (i != best) p[i] *= (1 - p[best]) / (sum - p[best]);
}

#endif

/* Packing: bf16 weights to tiles, exactly or rounded. */
#include "simd.h"
#ifdef SPECDEC_NATIVE

static inline bf16 half_of(float v) { return (bf16)_cvtss_sh(v, 0); }
static inline float half(bf16 v) { return _cvtsh_ss(v); }

static int equal(const float *w, F a, F b) { /* do the values round to these bf16 ones? */
    __mmask16 first = _mm512_cmpneq_epi32_mask(_mm512_castps_si512(rounded(a)), _mm512_castps_si512(_mm512_load_ps(w)));
    return !(first | _mm512_cmpneq_epi32_mask(_mm512_castps_si512(rounded(b)), _mm512_castps_si512(_mm512_load_ps(w + 16))));
}

/* Find float16 scale d and low m with bf16(q d + m) = w for all 32 weights; q from the extremes. 1 if they exist. */
static int fit4(const float *w, float *q, bf16 *scale, bf16 *low) {
    F a = _mm512_load_ps(w), b = _mm512_load_ps(w + 16);
    float least = _mm512_reduce_min_ps(_mm512_min_ps(a, b)), most = _mm512_reduce_max_ps(_mm512_max_ps(a, b));
    F steps = _mm512_set1_ps(most > least ? 15.0f / (most - least) : 0.0f), from = _mm512_set1_ps(least);
    F qa = _mm512_roundscale_ps(_mm512_mul_ps(_mm512_sub_ps(a, from), steps), 8);
    F qb = _mm512_roundscale_ps(_mm512_mul_ps(_mm512_sub_ps(b, from), steps), 8);
    _mm512_store_ps(q, qa), _mm512_store_ps(q + 16, qb);
    /* A weight holds between the midpoints to its bf16 neighbours: bounds on d, for each m that rounds to the least. */
    F bounds[2][2];
    for (int side = 0; side < 2; side++)
        for (int h = 0; h < 2; h++) {
            __m512i bits = _mm512_castps_si512(h ? b : a), step = _mm512_set1_epi32(0x8000);
            __mmask16 up = _mm512_cmplt_epi32_mask(bits, _mm512_setzero_si512()); /* negative: larger bits are lower */
            if (side) up = ~up;
            bits = _mm512_mask_add_epi32(_mm512_sub_epi32(bits, step), up, bits, step);
            __mmask16 zero = _mm512_cmp_ps_mask(h ? b : a, _mm512_setzero_ps(), _CMP_EQ_OQ);
            bounds[side][h] = _mm512_mask_mov_ps(_mm512_castsi512_ps(bits), zero, _mm512_set1_ps(side ? 1e-30f : -1e-30f));
        }
    F inverse[2] = {_mm512_div_ps(_mm512_set1_ps(1.0f), qa), _mm512_div_ps(_mm512_set1_ps(1.0f), qb)};
    __mmask16 set[2] = {_mm512_cmp_ps_mask(qa, _mm512_setzero_ps(), _CMP_GT_OQ), _mm512_cmp_ps_mask(qb, _mm512_setzero_ps(), _CMP_GT_OQ)};
    bf16 centre = half_of(least), least_bits = narrow(least);
    for (int away = 0; away < 24; away++) {
        bf16 m = (bf16)(centre + (away & 1 ? -(away + 1) / 2 : away / 2));
        float value = half(m);
        if (narrow(value) != least_bits) continue;
        float lo = -1e30f, hi = 1e30f;
        for (int h = 0; h < 2; h++) {
            if (!set[h]) continue;
            F x = _mm512_mul_ps(_mm512_sub_ps(bounds[0][h], _mm512_set1_ps(value)), inverse[h]);
            F y = _mm512_mul_ps(_mm512_sub_ps(bounds[1][h], _mm512_set1_ps(value)), inverse[h]);
            float l = _mm512_mask_reduce_max_ps(set[h], x), u = _mm512_mask_reduce_min_ps(set[h], y);
            lo = l > lo ? l : lo, hi = u < hi ? u : hi;
        }
        float middle = lo < -1e29f ? 0.0f : 0.5f * (lo + hi), slack = 1e-6f * (hi > 0 ? hi : -hi);
        if (lo > hi + slack) continue;
        bf16 near = half_of(middle);
        for (int other = 0; other < 7; other++) {
            bf16 d = (bf16)(near + (other & 1 ? -(other + 1) / 2 : other / 2));
            F s = _mm512_set1_ps(half(d)), z = _mm512_set1_ps(value);
            if (equal(w, _mm512_fmadd_ps(qa, s, z), _mm512_fmadd_ps(qb, s, z))) {
                *scale = d, *low = m;
                return 1;
            }
        }
    }
    return 0;
}

/* The same for bf16(q d), q whole and in -127 .. 127. */
static int fit8(const float *w, float *q, bf16 *scale) {
    F a = _mm512_load_ps(w), b = _mm512_load_ps(w + 16);
    float most = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(a), _mm512_abs_ps(b)));
    bf16 centre = half_of(most / 127);
    for (int away = 0; away < 24; away++) {
        bf16 d = (bf16)(centre + (away & 1 ? -(away + 1) / 2 : away / 2));
        float value = half(d);
        if (!(value > 0) && most > 0) continue;
        F s = _mm512_set1_ps(value), inverse = _mm512_set1_ps(value > 0 ? 1 / value : 0.0f);
        F qa = _mm512_roundscale_ps(_mm512_mul_ps(a, inverse), 8), qb = _mm512_roundscale_ps(_mm512_mul_ps(b, inverse), 8);
        if (_mm512_cmp_ps_mask(_mm512_abs_ps(qa), _mm512_set1_ps(127), _CMP_GT_OQ) | _mm512_cmp_ps_mask(_mm512_abs_ps(qb), _mm512_set1_ps(127), _CMP_GT_OQ))
            continue;
        if (equal(w, _mm512_mul_ps(qa, s), _mm512_mul_ps(qb, s))) {
            _mm512_store_ps(q, qa), _mm512_store_ps(q + 16, qb);
            *scale = d;
            return 1;
        }
    }
    return 0;
}

/* Rounding to 4 bits: codes between the extremes, then the scale and low that fit them best. */
static void round4(const float *w, float *q, bf16 *scale, bf16 *low) {
    float least = w[0], most = w[0], mq = 0, mw = 0, qq = 0, qw = 0;
    for (int i = 1; i < 32; i++) least = w[i] < least ? w[i] : least, most = w[i] > most ? w[i] : most;
    for (int i = 0; i < 32; i++) {
        q[i] = most > least ? __builtin_rintf((w[i] - least) * (15 / (most - least))) : 0;
        mq += q[i] / 32, mw += w[i] / 32;
    }
    for (int i = 0; i < 32; i++) qq += (q[i] - mq) * (q[i] - mq), qw += (q[i] - mq) * w[i];
    float d = qq > 0 ? qw / qq : 0;
    *scale = half_of(d), *low = half_of(mw - half(*scale) * mq);
}

static void round8(const float *w, float *q, bf16 *scale) {
    float most = 0;
    for (int i = 0; i < 32; i++) most = __builtin_fabsf(w[i]) > most ? __builtin_fabsf(w[i]) : most;
    *scale = half_of(most / 127);
    float d = half(*scale);
    for (int i = 0; i < 32; i++) {
        float v = d > 0 ? __builtin_rintf(w[i] / d) : 0;
        q[i] = v > 127 ? 127 : v < -127 ? -127 : v;
    }
}

/* Codes in -8 .. 7 for 32 weights; returns the scale that fits them best, of a few ranges the one with the least error. */
static float symmetric4(const float *w, float *q) {
    float most = 0, best = -1, found = 0;
    for (int i = 0; i < 32; i++) most = __builtin_fabsf(w[i]) > __builtin_fabsf(most) ? w[i] : most;
    memset(q, 0, 32 * sizeof *q);
    for (float range = 6.5f; most != 0 && range < 10; range += 0.5f) { /* the largest becomes -8 or so */
        float codes[32], qq = 0, qw = 0;
        for (int i = 0; i < 32; i++) {
            float v = __builtin_rintf(w[i] * (-range / most));
            codes[i] = v > 7 ? 7 : v < -8 ? -8 : v;
            qq += codes[i] * codes[i], qw += codes[i] * w[i];
        }
        if (qw * qw > best * qq) { /* the more, the smaller the error */
            best = qw * qw / qq, found = qw / qq;
            memcpy(q, codes, sizeof codes);
        }
    }
    return found;
}

/* Pack bf16 weights [out, in] into tiles of `kind`; rows up to the next multiple of 16 are zero. Weights that the kind
 * does not hold exactly: with `rounding` they are rounded, in place too, else packing ends. Returns 1 if all were packed. */
EXPORT int specdec_pack(int kind, int rounding, bf16 *weights, int out, int in, uint8_t *tiles, int threads) {
    int good = 1;
#pragma omp parallel num_threads(threads)
    {
        int from, to, bytes = TILE_BYTES[kind], columns = in / 32;
        split((out + 15) / 16, omp_get_thread_num(), omp_get_num_threads(), &from, &to);
        for (int t = from; t < to && __atomic_load_n(&good, __ATOMIC_RELAXED); t++)
            for (int k = 0; k < columns; k++) {
                uint8_t *tile = tiles + bytes * ((int64_t)t * columns + k);
                memset(tile, 0, (size_t)bytes);
                for (int row = 0; row < 16 && 16 * t + row < out; row++) {
                    bf16 *source = weights + (int64_t)(16 * t + row) * in + 32 * k;
                    if (kind == BF16) {
                        memcpy(tile + 64 * row, source, 64);
                        continue;
                    }
                    float w[32] __attribute__((aligned(64))), q[32] __attribute__((aligned(64)));
                    bf16 scale = 0, low = 0;
                    _mm512_store_ps(w, load_bf16(source)), _mm512_store_ps(w + 16, load_bf16(source + 16));
                    if (!(kind == Q4 ? fit4(w, q, &scale, &low) : fit8(w, q, &scale))) {
                        if (!rounding) {
                            __atomic_store_n(&good, 0, __ATOMIC_RELAXED);
                            break;
                        }
                        if (kind == Q4) round4(w, q, &scale, &low);
                        else round8(w, q, &scale);
                        for (int i = 0; i < 32; i++)
                            source[i] = narrow(kind == Q4 ? __builtin_fmaf(q[i], half(scale), half(low)) : q[i] * half(scale));
                    }
                    memcpy(tile + 2 * row, &scale, 2);
                    if (kind == Q4) {
                        memcpy(tile + 32 + 2 * row, &low, 2);
                        uint8_t *words = tile + 64 + 64 * (row / 4); /* nibble row % 4 of each 16-bit word */
                        for (int i = 0; i < 32; i++) words[2 * i + row % 4 / 2] |= (uint8_t)((int)q[i] << 4 * (row % 2));
                    } else
                        for (int i = 0; i < 32; i++) tile[32 + 32 * row + i] = (uint8_t)(int8_t)q[i];
                }
            }
    }
    return good;
}

/* Round bf16 weights [out, in] to I8 tiles (without AMX: 128 more) and a scale per row; rows up to the next multiple of
 * 16 are zero. */
EXPORT void specdec_pack_i8(const bf16 *weights, int out, int in, uint8_t *tiles, float *scale, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int row = 0; row < (out + 15) / 16 * 16; row++) {
        float most = 0;
        const bf16 *source = weights + (int64_t)row * in;
        for (int i = 0; row < out && i < in; i++) most = __builtin_fmaxf(most, __builtin_fabsf(widen(source[i])));
        scale[row] = most / 127;
        for (int i = 0; i < in; i++) {
            float v = most > 0 ? __builtin_rintf(widen(source[i]) * (127 / most)) : 0;
            tiles[16 * (int64_t)in * (row / 16) + 1024 * (i / 64) + 64 * (row % 16) + i % 64] = (uint8_t)((int)v + (has_amx ? 0 : 128));
        }
    }
}

/* Round bf16 weights [out, in] to I4 tiles, and what a row's products with tokens that are 128 too large exceed them by;
 * rows up to the next multiple of 16 are zero. Each half of a row's 64 inputs has the scale that fits it best. */
EXPORT void specdec_pack_i4(const bf16 *weights, int out, int in, uint8_t *tiles, float *excess, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int pair = 0; pair < (out + 15) / 16 * 8; pair++) /* two rows at a time: they share bytes */
        for (int row = 2 * pair; row < 2 * pair + 2; row++) {
            float sum = 0;
            for (int k = 0; k < in / 64; k++) {
                uint8_t *tile = tiles + TILE_BYTES[I4] * ((int64_t)(row / 16) * (in / 64) + k), *codes = tile + 64 + 64 * (row % 16 / 2);
                if (row % 2 == 0) memset(codes, 0, 64);
                for (int side = 0; side < 2; side++) {
                    float w[32], q[32];
                    for (int i = 0; i < 32; i++)
                        w[i] = row < out ? widen(weights[(int64_t)row * in + 64 * k + i / 4 * 8 + 4 * side + i % 4]) : 0;
                    bf16 scale = half_of(symmetric4(w, q) / 16);
                    memcpy(tile + 2 * (2 * (row % 16) + side), &scale, 2);
                    for (int i = 0; i < 32; i++) {
                        sum += 16 * q[i] * half(scale);
                        codes[i / 4 * 8 + 4 * side + i % 4] |= (uint8_t)(((int)q[i] & 15) << (row % 2 ? 0 : 4));
                    }
                }
            }
            excess[row] = 128 * sum;
        }
}
#endif

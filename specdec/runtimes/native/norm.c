/* Norms, rotary embeddings, and token rows to blocks and back. */
#include "simd.h"
#ifdef SPECDEC_NATIVE

/* RMS norm over the features of feature_major `x`, to vnni_bf16 (as transformers rounds: once after scaling, once after the weight).
 * weight NULL: ones. */
void norm(const float *x, const float *weight, int features, float eps, uint32_t *out) {
    F s[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int i = 0; i < features; i++) {
        F v = _mm512_load_ps(x + 16 * i);
        s[i & 3] = _mm512_fmadd_ps(v, v, s[i & 3]);
    }
    F sum = _mm512_add_ps(_mm512_add_ps(s[0], s[1]), _mm512_add_ps(s[2], s[3]));
    F mean = _mm512_div_ps(sum, _mm512_set1_ps((float)features));
    F factor = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_sqrt_ps(_mm512_add_ps(mean, _mm512_set1_ps(eps))));
    for (int i = 0; i < features; i += 2) {
        F a = rounded(_mm512_mul_ps(_mm512_load_ps(x + 16 * i), factor));
        F b = rounded(_mm512_mul_ps(_mm512_load_ps(x + 16 * i + 16), factor));
        if (weight) a = _mm512_mul_ps(a, _mm512_set1_ps(weight[i])), b = _mm512_mul_ps(b, _mm512_set1_ps(weight[i + 1]));
        _mm512_store_si512(out + 8 * i, paired(a, b));
    }
}

/* Token rows [count, features] to feature_major blocks, absent lanes zero; and back. */
void to_blocks(const bf16 *rows, int count, int features, float *fm) {
    memset(fm, 0, 64 * (size_t)features * ((count + 15) / 16));
    for (int r = 0; r < count; r++) {
        float *lane = fm + (int64_t)(r / 16) * features * 16 + r % 16;
        for (int i = 0; i < features; i++) lane[16 * i] = widen(rows[(int64_t)r * features + i]);
    }
}

void from_blocks(const float *fm, int first, int end, int features, bf16 *rows) {
    for (int r = first; r < end; r++) {
        const float *lane = fm + (int64_t)(r / 16) * features * 16 + r % 16;
        for (int i = 0; i < features; i++) rows[(int64_t)r * features + i] = narrow(lane[16 * i]);
    }
}

/* Rotate one head's feature_major rows in place and round them to bf16, after an optional norm. */
void rotate(float *head, const Model *m, const float *weight, const float *cos, const float *sin) {
    if (weight) {
        F sum = _mm512_setzero_ps();
        for (int i = 0; i < m->head_dim; i++) {
            F v = rounded(_mm512_load_ps(head + 16 * i));
            sum = _mm512_fmadd_ps(v, v, sum);
        }
        F mean = _mm512_div_ps(sum, _mm512_set1_ps((float)m->head_dim));
        F factor = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_sqrt_ps(_mm512_add_ps(mean, _mm512_set1_ps(m->eps))));
        for (int i = 0; i < m->head_dim; i++) {
            F v = rounded(_mm512_mul_ps(rounded(_mm512_load_ps(head + 16 * i)), factor));
            _mm512_store_ps(head + 16 * i, rounded(_mm512_mul_ps(v, _mm512_set1_ps(weight[i]))));
        }
    }
    int half = m->rotated / 2;
    for (int i = 0; i < half; i++) {
        F a = rounded(_mm512_load_ps(head + 16 * i)), b = rounded(_mm512_load_ps(head + 16 * (i + half)));
        F c = _mm512_load_ps(cos + 16 * i), s = _mm512_load_ps(sin + 16 * i);
        _mm512_store_ps(head + 16 * i, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)));
        _mm512_store_ps(head + 16 * (i + half), _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)));
    }
}
#endif

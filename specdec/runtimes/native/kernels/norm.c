/* Norms, rotary embeddings, and token rows to blocks and back. */

/* RMS norm over the features of feature_major `x`, to vnni_bf16. Rounds like transformers: after scaling, and after the weight.
 * weight NULL: ones. */
static void norm(const float *x, const float *weight, int features, float eps, uint32_t *out) {
    F s[4] = {zero16(), zero16(), zero16(), zero16()};
    for (int i = 0; i < features; i++) {
        F v = load16(x + 16 * i);
        s[i & 3] = fma16(v, v, s[i & 3]);
    }
    F sum = add16(add16(s[0], s[1]), add16(s[2], s[3]));
    F mean = div16(sum, set16((float)features));
    F factor = div16(set16(1.0f), sqrt16(add16(mean, set16(eps))));
    for (int i = 0; i < features; i += 2) {
        F a = rounded(mul16(load16(x + 16 * i), factor));
        F b = rounded(mul16(load16(x + 16 * i + 16), factor));
        if (weight) a = mul16(a, set16(weight[i])), b = mul16(b, set16(weight[i + 1]));
        store_u(out + 8 * i, paired(a, b));
    }
}

/* Token rows [count, features] to feature_major blocks (lanes without a token are 0), and back. */
static void to_blocks(const bf16 *rows, int count, int features, float *fm) {
    memset(fm, 0, 64 * (size_t)features * ((count + 15) / 16));
    for (int r = 0; r < count; r++) {
        float *lane = fm + (int64_t)(r / 16) * features * 16 + r % 16;
        for (int i = 0; i < features; i++) lane[16 * i] = widen(rows[(int64_t)r * features + i]);
    }
}

static void from_blocks(const float *fm, int first, int end, int features, bf16 *rows) {
    for (int r = first; r < end; r++) {
        const float *lane = fm + (int64_t)(r / 16) * features * 16 + r % 16;
        for (int i = 0; i < features; i++) rows[(int64_t)r * features + i] = narrow(lane[16 * i]);
    }
}

/* Rotate one head's feature_major rows in place and round them to bf16, after an optional norm. */
static void rotate(float *head, const Model *m, const float *weight, const float *cos, const float *sin) {
    if (weight) {
        F sum = zero16();
        for (int i = 0; i < m->head_dim; i++) {
            F v = rounded(load16(head + 16 * i));
            sum = fma16(v, v, sum);
        }
        F mean = div16(sum, set16((float)m->head_dim));
        F factor = div16(set16(1.0f), sqrt16(add16(mean, set16(m->eps))));
        for (int i = 0; i < m->head_dim; i++) {
            F v = rounded(mul16(rounded(load16(head + 16 * i)), factor));
            store16(head + 16 * i, rounded(mul16(v, set16(weight[i]))));
        }
    }
    int half = m->rotated / 2;
    for (int i = 0; i < half; i++) {
        F a = rounded(load16(head + 16 * i)), b = rounded(load16(head + 16 * (i + half)));
        F c = load16(cos + 16 * i), s = load16(sin + 16 * i);
        store16(head + 16 * i, fms16(a, c, mul16(b, s)));
        store16(head + 16 * (i + half), fma16(b, c, mul16(a, s)));
    }
}

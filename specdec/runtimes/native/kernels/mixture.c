/* Mixtures of experts in the place of MLPs. A pass reads each expert that any of its tokens takes once: tokens are grouped by expert,
 * in blocks. The results of a token's experts are added in the order of their numbers, whatever tokens are beside it. If there is an expert
 * for all tokens beside them, it is the layer's MLP, and the router's last output is its gate. */

/* The maximum number of blocks of tokens, grouped by expert. */
static int most_groups(const Model *m, int rows) {
    int taken = rows * m->top_k;
    return taken / 16 + (taken < m->experts ? taken : m->experts);
}

/* The experts of a token and their shares, from the router's logits in a lane; `rest` is scratch. Equal ones: the first. */
static void choose_experts(const Model *m, const float *logits, float *rest, int32_t *experts, float *shares) {
    float most = -__builtin_inff(), all = 0, some = 0;
    for (int e = 0; e < m->experts; e++) {
        rest[e] = logits[16 * e];
        if (rest[e] > most) most = rest[e];
    }
    for (int e = 0; e < m->experts; e++) all += exp1(rest[e] - most);
    for (int i = 0; i < m->top_k; i++) {
        int best = -1;
        for (int e = 0; e < m->experts; e++) {
            int there = 0;
            for (int j = 0; j < i; j++) there |= experts[j] == e;
            if (!there && (best < 0 || rest[e] > rest[best])) best = e;
        }
        experts[i] = best, shares[i] = exp1(rest[best] - most) / all, some += shares[i];
    }
    for (int i = 0; i < m->top_k; i++) shares[i] = widen(narrow(m->normalize_top_k ? shares[i] / some : shares[i]));
}

/* Group all tokens by the experts that a layer's router chooses. */
static void group_tokens(Pass *p, int index, int features) {
    const Model *m = p->m;
    Mixed *g = &p->mixed;
    int blocks = 0;
    memset(g->count, 0, 4 * (size_t)m->experts);
    for (int r = 0; r < p->rows; r++) {
        choose_experts(m, g->logits + (int64_t)(r / 16) * features * 16 + r % 16, g->rest, g->experts + r * m->top_k,
            g->shares + r * m->top_k);
        if (p->c->routed) memcpy(p->c->routed + ((int64_t)r * p->c->hi + index) * m->experts, g->rest, 4 * (size_t)m->experts);
        for (int i = 0; i < m->top_k; i++) g->count[g->experts[r * m->top_k + i]]++;
    }
    for (int e = g->groups = 0; e < m->experts; e++) {
        if (!g->count[e]) continue;
        g->group[g->groups++] = (Grouped){e, blocks, g->count[e]};
        for (int left = g->count[e]; left > 0; left -= 16) g->tokens[blocks++] = left < 16 ? left : 16;
        g->count[e] = 16 * g->group[g->groups - 1].block; /* from here on: its next lane */
    }
    g->blocks = blocks;
    for (int at = 0; at < p->rows * m->top_k; at++) {
        int lane = g->count[g->experts[at]]++;
        g->row[lane] = at / m->top_k, g->share[lane] = g->shares[at];
    }
}

/* vnni_bf16 blocks `x` of grouped tokens as `map` reads them; all threads share the work, and wait. */
static const uint32_t *group_inputs(Pass *p, const Linear *map, const uint32_t *x, int me, int n) {
    Mixed *g = &p->mixed;
    int from, to;
    split(g->blocks, me, n, &from, &to);
    for (int b = from; b < to && !reads_vnni(map); b++)
        input_of(map, x + (int64_t)b * map->in * 8, g->tokens[b], g->inputs + b * block_bytes(map));
    wait_for_team(&p->barrier, n);
    return reads_vnni(map) ? x : (const uint32_t *)g->inputs;
}

/* x += the sum over each token's experts of their shares times their results. */
static void mix(Pass *p, int index, int me, int n) {
    const Model *m = p->m;
    const Layer *layer = m->layers + index;
    Mixed *g = &p->mixed;
    float sums[MOST_BLOCKS * 256] __attribute__((aligned(64)));
    int from, to, hidden = m->hidden, inner = layer->sums->in, features = layer->router.out;
    const uint32_t *x = inputs_of(p, &layer->router, layer->norm_mlp, NULL, me, n);
    const uint32_t *normed = p->blocks > 1 ? p->normed : (const uint32_t *)(p->scratch + p->own * me);
    split(features / 16, me, n, &from, &to);
    for (int b0 = 0; b0 < p->blocks; b0 += MOST_BLOCKS)
        for (int t = from; t < to; t++)
            rounded_product(&layer->router, t, from_block(&layer->router, x, b0), tokens_from(p, b0), features,
                g->logits + (int64_t)b0 * features * 16);
    wait_for_team(&p->barrier, n);
    if (!me) {
        group_tokens(p, index, features);
        if (m->demand && m->demand(index, g->groups, &g->group->expert, p->rows, p->x, g->logits)) g->groups = g->blocks = 0;
    }
    wait_for_team(&p->barrier, n);
    split(g->blocks, me, n, &from, &to);
    for (int b = from; b < to; b++) {
        uint32_t *out = g->normed + (int64_t)b * hidden * 8;
        if (g->tokens[b] < 16) memset(out, 0, 32 * (size_t)hidden);
        for (int lane = 0; lane < g->tokens[b]; lane++) {
            int row = g->row[16 * b + lane];
            const uint32_t *in = normed + (int64_t)(row / 16) * hidden * 8 + row % 16;
            for (int i = 0; i < hidden / 2; i++) out[16 * i + lane] = in[16 * i];
        }
    }
    x = group_inputs(p, layer->gates, g->normed, me, n); /* of the blocks that this thread has made itself */
    split(inner / 16, me, n, &from, &to);
    for (int i = 0; i < g->groups; i++) {
        const Linear *map = layer->gates + g->group[i].expert;
        for (int b0 = 0; 16 * b0 < g->group[i].tokens; b0 += MOST_BLOCKS) {
            int left = g->group[i].tokens - 16 * b0, tokens = left < 16 * MOST_BLOCKS ? left : 16 * MOST_BLOCKS,
                block = g->group[i].block + b0;
            for (int t = from; t < to; t++)
                gated_product(m, map, t, from_block(map, x, block), tokens, inner, p->inner + (int64_t)block * inner * 8);
        }
    }
    wait_for_team(&p->barrier, n);
    x = group_inputs(p, layer->sums, p->inner, me, n);
    split(hidden / 16, me, n, &from, &to);
    for (int b = 0; b < p->blocks; b++) memset(p->qkv + ((int64_t)b * hidden + 16 * from) * 16, 0, 1024 * (size_t)(to - from));
    for (int i = 0; i < g->groups; i++) {
        const Linear *map = layer->sums + g->group[i].expert;
        for (int b0 = 0; 16 * b0 < g->group[i].tokens; b0 += MOST_BLOCKS) {
            int left = g->group[i].tokens - 16 * b0, tokens = left < 16 * MOST_BLOCKS ? left : 16 * MOST_BLOCKS,
                block = g->group[i].block + b0;
            for (int t = from; t < to; t++) {
                product(map, t, from_block(map, x, block), tokens, sums);
                for (int lane = 0; lane < tokens; lane++) {
                    int row = g->row[16 * block + lane];
                    float share = g->share[16 * block + lane], *sum = p->qkv + ((int64_t)(row / 16) * hidden + 16 * t) * 16 + row % 16;
                    const float *result = sums + 256 * (lane / 16) + lane % 16;
                    for (int o = 0; o < 16; o++) sum[16 * o] += share * widen(narrow(result[16 * o]));
                }
            }
        }
    }
    if (layer->down.in) {
        wait_for_team(&p->barrier, n);
        x = gate_and_up(p, index, me, n);
    }
    for (int b0 = 0; layer->down.in && b0 < p->blocks; b0 += MOST_BLOCKS) {
        int tokens = tokens_from(p, b0);
        for (int t = from; t < to; t++) {
            product(&layer->down, t, from_block(&layer->down, x, b0), tokens, sums);
            for (int b = 0; b < (tokens + 15) / 16; b++) {
                F share = rounded(sigmoid16(load16(g->logits + ((int64_t)(b0 + b) * features + m->experts) * 16)));
                for (int o = 0; o < 16; o++) {
                    float *sum = p->qkv + ((int64_t)(b0 + b) * hidden + 16 * t + o) * 16;
                    store16(sum, add16(rounded(load16(sum)), rounded(mul16(share, rounded(load16(sums + 256 * b + 16 * o))))));
                }
            }
        }
    }
    for (int b = 0; b < p->blocks; b++)
        for (int64_t at = ((int64_t)b * hidden + 16 * from) * 16; at < ((int64_t)b * hidden + 16 * to) * 16; at += 16)
            store16(p->x + at, rounded(add16(load16(p->x + at), rounded(load16(p->qkv + at)))));
    wait_for_team(&p->barrier, n);
}

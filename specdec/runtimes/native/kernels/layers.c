/* A pass of a team of threads through decoder layers. */

typedef struct {
    int32_t sequence, kv, block; /* queries (columns) of a sequence, a token and a head each, for one key head */
} Item;

typedef struct {
    int32_t expert, block, tokens; /* number of the expert; index of its first block among all experts' blocks; its tokens */
} Grouped;

typedef struct {                   /* tokens by expert; arrays by lane are [blocks][16] */
    int groups, blocks;
    Grouped *group;
    float *logits, *rest;          /* of the router: [block][experts][16]; scratch */
    int32_t *count, *experts, *row, *tokens; /* scratch by expert; experts of each token; row of each lane; tokens of each block */
    float *shares, *share;         /* of each token's experts; of each lane */
    uint32_t *normed;              /* vnni_bf16, and (inputs) as maps read it */
    uint8_t *inputs;
} Mixed;

typedef struct {                   /* how uncommitted tokens of a sequence follow one another, in recurrent layers */
    int count;                     /* number of the tokens; those of the call are the last */
    /* of each: the token before it (ROOT: a committed one, SKIPPED: it is not run); the state that it reads */
    int32_t *parent, *from, *to;
} Branches;                        /* (0: that of the committed tokens), and the one that it writes (0: none) */

typedef struct {                   /* how layers of a buffer attend */
    int heads, size, group, count; /* of keys: number and size of heads; queries of each; number of items */
    Item *items;                   /* work items of attention */
} Attending;

typedef struct {
    const Model *m;
    const Call *c;
    int rows, blocks, threads;
    int32_t *sequence_of, *first;                /* sequence of each token; first token of each sequence */
    Item *items;                             /* of all buffers */
    Attending attending[BUFFERS];
    size_t scored, input, own;               /* scratch of a thread: offsets of its parts, and its size */
    /* feature_major; cos and sin [table][block][rotated / 2][16]; qkv also has a product to be normed */
    float *x, *qkv, *cos, *sin;
    bf16 *fresh;                             /* [rows][input_width], if there are recurrent layers: their inputs */
    Branches *branches;                      /* of each sequence */
    size_t mixer;                            /* scratch of a thread for them: its offset */
    float *factors;                          /* [queries, keys][block][16]: 1 / RMS across heads */
    uint32_t *attended, *inner;              /* vnni_bf16; inner may be rounded tokens */
    bf16 *queries;                           /* [rows, heads, head_dim] */
    uint32_t *normed;                        /* if there are several blocks: all of them, in vnni_bf16, and (inputs) as maps read them */
    uint8_t *inputs;
    uint32_t *embedded;                      /* vnni_bf16, if layers have embeddings of their own: the inputs of the first layer */
    uint8_t *memory;                         /* of all that the pass points to */
    uint8_t *scratch;                        /* by thread: a normed block, scores of attention, and a block as a map reads it */
    Mixed mixed;                             /* if the model has experts */
    Barrier barrier;
} Pass;

enum { MOST_EXPECTED = 1024 }; /* maximum number of cached slots that are prefetched during the projections */

/* The columns of a sequence, in blocks of equal width: few enough for a key head's cached keys to be read once, and enough for
 * all threads. */
static int column_blocks_of(const Pass *p, const Attending *h, const Sequence *sequence) {
    const int columns = sequence->tokens * h->group, share = (columns * h->heads / p->threads + 15) / 16 * 16;
    const int most = share < 16 ? 16 : share < MOST_COLUMNS ? share : MOST_COLUMNS;
    return (columns + most - 1) / most;
}

static int block_width(const Pass *p, const Attending *h, const Sequence *sequence) {
    int blocks = column_blocks_of(p, h, sequence);
    return (sequence->tokens * h->group + blocks - 1) / blocks;
}

/* The number of groups of MOST_BLOCKS blocks, which are multiplied at once. */
static int groups_of(const Pass *p) { return (p->blocks + MOST_BLOCKS - 1) / MOST_BLOCKS; }

/* The number of tokens from block b0 on, in as many blocks as are multiplied at once. */
static int tokens_from(const Pass *p, int b0) {
    int left = p->rows - 16 * b0;
    return left < 16 * MOST_BLOCKS ? left : 16 * MOST_BLOCKS;
}

INLINE F activated_times(const Model *m, F gate, F up) {
    F g = rounded(gate), a = g, u = rounded(up), limit = set16(m->limit);
    if (m->activation == CLAMPED) {
        g = sub16(zero16(), max16(sub16(zero16(), g), sub16(zero16(), limit)));
        u = sub16(zero16(), max16(sub16(zero16(), max16(u, sub16(zero16(), limit))), sub16(zero16(), limit)));
        a = mul16(g, set16(m->alpha)), u = rounded(add16(u, set16(1.0f)));
    }
    if (m->activation == GELU) a = mul16(fma16(mul16(mul16(g, g), g), set16(0.044715f), g), set16(1.5957691216f)); /* 2 sqrt(2 / pi) */
    F e = exp16(sub16(zero16(), max16(a, set16(-80.0f))));
    return mul16(rounded(div16(g, add16(set16(1.0f), e))), u);
}

/* Write 16 features, rounded, to a lane of vnni_bf16. */
static inline void put_lane(uint32_t *lane, F v) {
    uint32_t pairs[8] __attribute__((aligned(32)));
    store_h(pairs, narrow16(v));
    for (int i = 0; i < 8; i++) lane[16 * i] = pairs[i];
}

/* act(gate) up for 16 outputs of a block. With few tokens, several outputs share a vector. Lanes without a token get 0. */
static void gated(const Model *m, const float *gate, const float *up, int tokens, F *act) {
    if (tokens <= 4)
        for (int o = 0; o < 16; o += 4) split_four16(activated_times(m, four_rows16(gate + 16 * o), four_rows16(up + 16 * o)), act + o);
    else if (tokens <= 8)
        for (int o = 0; o < 16; o += 2) split_two16(activated_times(m, two_rows16(gate + 16 * o), two_rows16(up + 16 * o)), act + o);
    else
        for (int o = 0; o < 16; o++) act[o] = activated_times(m, load16(gate + 16 * o), load16(up + 16 * o));
}

/* Tile `t` of act(gate(x)) up(x), to vnni_bf16 blocks of `inner` features; `map` has the gates and then the ups. */
static void gated_product(const Model *m, const Linear *map, int t, const uint32_t *x, int tokens, int inner, uint32_t *out) {
    float gate[MOST_BLOCKS * 256] __attribute__((aligned(64))), up[MOST_BLOCKS * 256] __attribute__((aligned(64)));
    product(map, t, x, tokens, gate);
    product(map, inner / 16 + t, x, tokens, up);
    for (int b = 0; 16 * b < tokens; b++) {
        F act[16];
        gated(m, gate + 256 * b, up + 256 * b, tokens - 16 * b, act);
        for (int o = 0; o < 16; o += 2) store_u(out + ((int64_t)b * inner + 16 * t + o) * 8, paired(act[o], act[o + 1]));
    }
}

/* As gated_product, for the tiles 2 k and 2 k + 1 of a rounded map: the k-th 32 inputs of each token, rounded, as `next` reads them. */
static void gated_inputs(const Model *m, const Linear *map, int k, const uint32_t *x, int tokens, const Linear *next, uint8_t *out) {
    for (int b = 0; 16 * b < tokens; b++) {
        const int some = tokens - 16 * b < 16 ? tokens - 16 * b : 16;
        const Rounded *input = (const Rounded *)from_block(map, x, b);
        Rounded *to = (Rounded *)(out + b * block_bytes(next)) + k * some;
        float gate[2][16][16] __attribute__((aligned(64))), up[2][16][16] __attribute__((aligned(64)));
        for (int h = 0; h < 2; h++) rows_of_product(map, 2 * k + h, input, some, gate[h]);
        for (int h = 0; h < 2; h++) rows_of_product(map, next->in / 16 + 2 * k + h, input, some, up[h]);
        for (int r = 0; r < some; r++) {
            uint32_t pairs[16] __attribute__((aligned(64)));
            for (int h = 0; h < 2; h++) store_h(pairs + 8 * h, narrow16(activated_times(m, load16(gate[h][r]), load16(up[h][r]))));
            round_token(load_u(pairs), to + r);
        }
    }
}

/* Tile `t` of map(x), rounded, to feature_major blocks of `width` features. */
static void rounded_product(const Linear *map, int t, const uint32_t *x, int tokens, int width, float *out) {
    float sums[MOST_BLOCKS * 256] __attribute__((aligned(64)));
    product(map, t, x, tokens, sums);
    for (int b = 0; 16 * b < tokens; b++)
        for (int o = 0; o < 16; o++) store16(out + ((int64_t)b * width + 16 * t + o) * 16, rounded(load16(sums + 256 * b + 16 * o)));
}

/* Prefetch part `at` of `parts` of the cached keys and values that the thread will attend to. */
static void prefetch_cache(const Pass *p, int index, int at, int parts, int me, int n) {
    const Model *m = p->m;
    const Call *c = p->c;
    const int buffer = m->layers[index].buffer, heads = m->buffers[buffer].count;
    int items = c->count * heads, together, from, to;
    const int64_t row = cache_row(c->cache, m->buffers[buffer].size), place = m->layers[index].place;
    for (int turn = 0; turn < turns_of(items, n); turn++) {
        int item = item_of(turn, items, me, n, &together);
        const Sequence *sequence = c->sequences + item / heads;
        int slots = sequence->start + sequence->tokens;
        split(slots < MOST_EXPECTED ? (int)(slots * row / 64) : 0, at, parts, &from, &to);
        int64_t first = (place * heads + item % heads) * sequence->capacity[buffer] * row;
        for (int at_ = from; at_ < to; at_++) {
            __builtin_prefetch(sequence->keys[buffer] + first + 64 * at_, 0, 2);
            __builtin_prefetch(sequence->values[buffer] + first + 64 * at_, 0, 2);
        }
    }
}

/* Write the lanes of feature_major `fm` to rows of an 8-bit cache: int8, rounded to nearest, and scales. */
static void put_rows8(const float *fm, int d, uint8_t *const *rows, int count) {
    float most[16] __attribute__((aligned(64)));
    for (int first = 0; first < d; first += TOGETHER) {
        F largest = zero16(), broken = zero16(); /* NaN if a number is not finite; the scale is then NaN, too */
        for (int i = first; i < first + TOGETHER; i++) {
            F v = load16(fm + 16 * i);
            largest = max16(largest, abs16(v)), broken = fma16(v, zero16(), broken);
        }
        store16(most, add16(largest, broken));
        for (int lane = 0; lane < count; lane++) {
            int8_t *to = (int8_t *)rows[lane];
            bf16 *scale = (bf16 *)(to + d) + first / TOGETHER;
            *scale = most[lane] < 1e-30f ? 0 : narrow(most[lane] / 127);
            float inverse = *scale ? 1 / widen(*scale) : 0; /* a scale that was rounded down makes no code of 128 */
            for (int i = first; i < first + TOGETHER; i++) to[i] = (int8_t)__builtin_rintf(fm[16 * i + lane] * inverse);
        }
    }
}

static void put_rows16(const float *fm, int d, uint8_t *const *rows, int count) {
    for (int lane = 0; lane < count; lane++) {
        bf16 *to = (bf16 *)rows[lane];
        for (int i = 0; i < d; i++) to[i] = narrow(fm[16 * i + lane]);
    }
}

/* The input of `map` for vnni_bf16 `x`; NULL: for the hidden states after a norm (weight NULL: none). Each thread makes a single
 * block itself, which is cheaper than waiting; several blocks are shared, and then all threads wait. */
static const uint32_t *inputs_of(Pass *p, const Linear *map, const float *weight, const uint32_t *x, int me, int n) {
    const int hidden = p->m->hidden, shared = p->blocks > 1;
    uint8_t *mine = p->scratch + p->own * me;
    uint32_t *normed = shared ? p->normed : (uint32_t *)mine;
    int from = 0, to = 1;
    if (x && reads_vnni(map)) return x;
    if (shared) split(p->blocks, me, n, &from, &to);
    for (int b = from; b < to; b++) {
        int tokens = p->rows - 16 * b < 16 ? p->rows - 16 * b : 16;
        if (!x && weight) norm(p->x + (int64_t)b * hidden * 16, weight, hidden, p->m->eps, p->m->round_after_weight, normed + (int64_t)b * hidden * 8);
        else if (!x) to_pairs(p->x + (int64_t)b * hidden * 16, hidden, normed + (int64_t)b * hidden * 8);
        uint8_t *out = shared ? p->inputs + b * block_bytes(map) : mine + p->input;
        input_of(map, (x ? x : normed) + (int64_t)b * map->in * 8, tokens, out);
    }
    if (shared) wait_for_team(&p->barrier, n);
    return reads_vnni(map) ? normed : (const uint32_t *)(shared ? p->inputs : mine + p->input);
}

/* p->qkv, features from `at` on of `width`, = map(norm_in(x)), feature_major and rounded. If the layer has attention, the thread's part of
 * the cache is prefetched meanwhile. */
static void project_heads(Pass *p, int index, const Linear *map, int at, int width, int me, int n) {
    const Layer *layer = p->m->layers + index;
    const uint32_t *input = inputs_of(p, map, layer->norm_in, NULL, me, n);
    const int share = (map->out / 16 + n - 1) / n;
    Work work = {&p->barrier, map->out / 16, groups_of(p), me, n};
    for (int done = 0, t; (t = next_item(&work)) >= 0; done++) {
        const int b0 = MOST_BLOCKS * work.group;
        if (done < share && !layer->convolution) prefetch_cache(p, index, done, share, me, n);
        rounded_product(map, t, from_block(map, input, b0), tokens_from(p, b0), width, p->qkv + ((int64_t)b0 * width + at) * 16);
    }
    wait_for_team(&p->barrier, n);
}

/* Norm and rotate each head of each block, then store its rows as queries, or as keys or values in the cache. */
static void store_heads(Pass *p, int index, int me, int n) {
    const Model *m = p->m;
    const Call *c = p->c;
    const Layer *layer = m->layers + index;
    const int buffer = layer->buffer, d = m->buffers[buffer].size, kv_heads = m->buffers[buffer].count;
    int total = m->heads + (layer->reads ? 0 : 2 * kv_heads), all = total + m->heads * m->gated, from, to;
    const int64_t cached_row = cache_row(c->cache, d);
    if (m->across) {
        split(2 * p->blocks, me, n, &from, &to);
        for (int item = from; item < to; item++) {
            int keys = item / p->blocks, first = keys ? m->heads : 0, heads = keys ? kv_heads : m->heads;
            store16(p->factors + 16 * item, inverse_rms(p->qkv + ((int64_t)(item % p->blocks) * all + first) * d * 16, heads * d, m->eps));
        }
        wait_for_team(&p->barrier, n);
    }
    split(p->blocks * total, me, n, &from, &to);
    for (int item = from; item < to; item++) { /* one head of a block */
        int b = item / total, head = item % total, kv = head - m->heads;
        float *fm = p->qkv + ((int64_t)b * all + head + m->gated * (kv < 0 ? head : m->heads)) * d * 16;
        const float *weight = kv < 0 ? layer->norm_q : kv < kv_heads ? layer->norm_k : NULL;
        int table = kv < 0 ? layer->rotary_q : kv < kv_heads ? layer->rotary_k : -1;
        if (m->normed_values && kv >= kv_heads) {
            F factor = inverse_rms(fm, d, m->eps);
            for (int i = 0; i < d; i++) store16(fm + 16 * i, rounded(mul16(load16(fm + 16 * i), factor)));
        }
        if (weight) {
            F factor = m->across ? load16(p->factors + 16 * (b + (kv < 0 ? 0 : p->blocks))) : inverse_rms(fm, d, m->eps);
            if (m->across) weight += (kv < 0 ? head : kv) * d;
            for (int i = 0; i < d; i++) store16(fm + 16 * i, rounded(normed16(load16(fm + 16 * i), factor, weight + i, m->round_after_weight)));
        }
        int64_t at = ((int64_t)table * p->blocks + b) * (m->rotated / 2) * 16;
        if (table >= 0) rotate(fm, layer->rotated / 2, p->cos + at, p->sin + at);
        uint8_t *rows[16];
        int count = p->rows - 16 * b < 16 ? p->rows - 16 * b : 16;
        for (int lane = 0; lane < count; lane++) {
            int row = b * 16 + lane, number = p->sequence_of[row];
            const Sequence *sequence = c->sequences + number;
            int64_t slot = ((int64_t)layer->place * kv_heads + kv % kv_heads) * sequence->capacity[buffer] + sequence->start
                + row - p->first[number];
            rows[lane] = kv < 0 ? (uint8_t *)(p->queries + ((int64_t)row * m->heads + head) * d)
                                : (kv < kv_heads ? sequence->keys : sequence->values)[buffer] + slot * cached_row;
        }
        if (kv >= 0 && c->cache == CACHE8) put_rows8(fm, d, rows, count);
        else put_rows16(fm, d, rows, count);
    }
    wait_for_team(&p->barrier, n);
}

/* Let r->a have the queries of the columns from number `first` of a sequence on, and the slots that they see. */
static void set_columns(const Pass *p, const Layer *layer, const Sequence *sequence, int kind, int begin, int kv, int first, Reading *r) {
    const Model *m = p->m;
    Attention *a = r->a;
    const int d = r->d, group = p->attending[layer->buffer].group, slots = sequence->start + sequence->tokens, behind = slots - sequence->committed;
    const int window = p->c->spans[kind], near = p->c->near, span = window && (!near || window <= near) ? window : near;
    const int filled = layer->reads && sequence->filled < slots ? sequence->filled : slots;
    r->begin = span == window || sequence->committed < KEYS ? 0 : KEYS;
    r->first = slots, r->end = sequence->trees ? slots : 0, r->committed = sequence->trees ? sequence->committed : slots;
    memset(a->queries, 0, (size_t)(r->columns + 15) / 16 * 32 * d);
    if (sequence->trees) memset(a->tree, 0, sizeof *a->tree * (size_t)behind);
    for (int col = 0; col < r->columns; col++) {
        const int token = (first + col) / group, head = kv * group + (first + col) % group;
        const uint32_t *pairs = (const uint32_t *)(p->queries + ((int64_t)(begin + token) * m->heads + head) * d);
        uint32_t *to = a->queries + col / 16 * 8 * d + col % 16;
        for (int i = 0; i < d / 2; i++) to[16 * i] = pairs[i];
        const int64_t last = sequence->trees ? p->c->positions[begin + token] + 1 : sequence->start + token + 1;
        const int64_t from = span && span < last ? last - span : 0, seen = sequence->trees ? sequence->committed : last, end = seen < filled ? seen : filled;
        a->first[col / 16][col % 16] = (float)from, a->end[col / 16][col % 16] = (float)end;
        a->chained[col / 16][col % 16] = (float)(last - LATE < end ? last - LATE : end);
        if (from < r->first) r->first = (int)from;
        if (end > r->end) r->end = (int)end;
        for (int s = 0; sequence->trees && s < behind && sequence->committed + s < filled; s++)
            if (sequence->trees[kind][(int64_t)token * behind + s]) a->tree[s][col / 16] |= (uint16_t)(1 << col % 16);
    }
}

/* attended = attention of the queries over the cached keys and values, times its gate if there is one. a: scratch of the thread. */
static void attend_all(Pass *p, int index, Attention *a, int me, int n) {
    const Model *m = p->m;
    const Call *c = p->c;
    const Layer *layer = m->layers + index;
    const Attending *h = p->attending + layer->buffer;
    const float *own = layer->sinks;
    const int d = h->size;
    int together;
    float sinks[MOST_COLUMNS];
    for (int turn = 0; turn < turns_of(h->count, n); turn++) {
        Item item = h->items[item_of(turn, h->count, me, n, &together)];
        const Sequence *sequence = c->sequences + item.sequence;
        int kv = item.kv, begin = p->first[item.sequence], bit = 0, width = block_width(p, h, sequence);
        int left = sequence->tokens * h->group - width * item.block, end = left < width ? left : width;
        if (together) split(end, me, n, &bit, &end); /* by columns */
        const int first = width * item.block + bit;
        const int64_t cached = ((int64_t)layer->place * h->heads + kv) * sequence->capacity[layer->buffer] * cache_row(c->cache, d);
        Reading r = {a, sequence->keys[layer->buffer] + cached, sequence->values[layer->buffer] + cached, c->cache, d, end - bit, 0, 0, 0, 0,
            m->scale, m->cap};
        if (r.columns <= 0) continue;
        set_columns(p, layer, sequence, c->window[index], begin, kv, first, &r);
        for (int col = 0; own && col < r.columns; col++) sinks[col] = own[kv * h->group + (first + col) % h->group];
        attend(&r, own ? sinks : NULL, column_blocks_of(p, h, sequence) == 1);
        for (int col = 0; col < r.columns; col++) {
            int row = begin + (first + col) / h->group, head = kv * h->group + (first + col) % h->group;
            uint32_t *lane = p->attended + ((int64_t)(row / 16) * m->heads * d + head * d) * 8 + row % 16;
            const float *gate = p->qkv + (((int64_t)(row / 16) * 2 * (m->heads + h->heads) + 2 * head + 1) * d) * 16 + row % 16;
            for (int i = 0; i < d; i += 16) {
                F v = load16(a->out + col * d + i);
                if (m->gated) v = mul16(rounded(v), rounded(sigmoid16(column16(gate + 16 * i))));
                put_lane(lane + 8 * i, v);
            }
        }
    }
    wait_for_team(&p->barrier, n);
}

/* act(gate(norm(x))) up(norm(x)), as `down` reads it. */
static const uint32_t *gate_and_up(Pass *p, int index, int me, int n) {
    const Layer *layer = p->m->layers + index;
    const Linear *map = &layer->gate_up, *down = &layer->down;
    const int rounded = map->rounded && down->rounded, inner = down->in;
    const uint32_t *input = inputs_of(p, map, layer->norm_mlp, NULL, me, n);
    Work work = {&p->barrier, inner / (rounded ? 32 : 16), groups_of(p), me, n};
    for (int t; (t = next_item(&work)) >= 0;) {
        const int b0 = MOST_BLOCKS * work.group, tokens = tokens_from(p, b0);
        const uint32_t *x = from_block(map, input, b0);
        if (rounded) gated_inputs(p->m, map, t, x, tokens, down, (uint8_t *)p->inner + b0 * block_bytes(down));
        else gated_product(p->m, map, t, x, tokens, inner, p->inner + (int64_t)b0 * inner * 8);
    }
    wait_for_team(&p->barrier, n);
    return rounded ? p->inner : inputs_of(p, down, NULL, p->inner, me, n);
}

/* x += a norm of the rounded products in p->qkv; x times `scale`. */
static void add_normed(Pass *p, const float *weight, float scale, int me, int n) {
    int hidden = p->m->hidden, shared = p->blocks > 1, from, to;
    split(shared ? p->blocks : hidden, me, n, &from, &to); /* a single block by features */
    for (int b = shared ? from : 0; b < (shared ? to : 1); b++) {
        float *x = p->x + (int64_t)b * hidden * 16;
        const float *result = p->qkv + (int64_t)b * hidden * 16;
        const F factor = inverse_rms(result, hidden, p->m->eps);
        for (int i = shared ? 0 : from; i < (shared ? hidden : to); i++)
            store16(x + 16 * i, rounded(mul16(set16(scale), rounded(add16(load16(x + 16 * i),
                rounded(normed16(load16(result + 16 * i), factor, weight + i, p->m->round_after_weight)))))));
    }
    wait_for_team(&p->barrier, n);
}

/* x += map(input), after a norm and then times `scale` unless `weight` is NULL; rounded as transformers does: the product
 * once, the sum once. */
static void add_product(Pass *p, const Linear *map, const float *weight, float scale, const uint32_t *input, int me, int n) {
    float sums[MOST_BLOCKS * 256] __attribute__((aligned(64)));
    Work work = {&p->barrier, map->out / 16, groups_of(p), me, n};
    for (int t; (t = next_item(&work)) >= 0;) {
        const int b0 = MOST_BLOCKS * work.group, tokens = tokens_from(p, b0), blocks = (tokens + 15) / 16;
        for (int b = 0; !weight && b < blocks; b++)
            for (int o = 0; o < 16; o++) __builtin_prefetch(p->x + ((int64_t)(b0 + b) * map->out + 16 * t + o) * 16, 1);
        product(map, t, from_block(map, input, b0), tokens, sums);
        for (int b = 0; b < blocks; b++)
            for (int o = 0; o < 16; o++) {
                int64_t at = ((int64_t)(b0 + b) * map->out + 16 * t + o) * 16;
                F v = rounded(load16(sums + 256 * b + 16 * o));
                if (weight) store16(p->qkv + at, v);
                else store16(p->x + at, rounded(add16(load16(p->x + at), v)));
            }
    }
    wait_for_team(&p->barrier, n);
    if (weight) add_normed(p, weight, scale, me, n);
}

/* p->embedded = the inputs of the first layer. */
static void embed_again(Pass *p, int me, int n) {
    const int hidden = p->m->hidden;
    bf16 *row = (bf16 *)(p->scratch + p->own * me);
    int from, to;
    split(p->blocks, me, n, &from, &to);
    for (int b = from; b < to; b++) {
        uint32_t *out = p->embedded + (int64_t)b * hidden * 8;
        memset(out, 0, 32 * (size_t)hidden);
        for (int lane = 0; lane < 16 && 16 * b + lane < p->rows; lane++) {
            read_row(p->m->embedding, p->c->ids[16 * b + lane], row);
            for (int i = 0; i < hidden / 2; i++) out[16 * i + lane] = ((uint32_t *)row)[i];
        }
    }
    wait_for_team(&p->barrier, n);
}

/* x += what the layer adds of its own embeddings of the tokens. */
static void add_embedded(Pass *p, int index, int me, int n) {
    const Model *m = p->m;
    const Layer *layer = m->layers + index;
    const Linear *maps[] = {&layer->embedded_gate, &layer->embedded_in};
    const int size = layer->embedded_gate.out, width = 3 * size, shared = p->blocks > 1;
    bf16 *row = (bf16 *)(p->scratch + p->own * me);
    int from, to;
    for (int i = 0; i < 2; i++) {
        const uint32_t *input = inputs_of(p, maps[i], NULL, i ? p->embedded : NULL, me, n);
        split(size / 16, me, n, &from, &to);
        for (int b0 = 0; b0 < p->blocks; b0 += MOST_BLOCKS)
            for (int t = from; t < to; t++)
                rounded_product(maps[i], t, from_block(maps[i], input, b0), tokens_from(p, b0), width,
                    p->qkv + ((int64_t)b0 * width + i * size) * 16);
        wait_for_team(&p->barrier, n);
    }
    split(shared ? p->blocks : size / 2, me, n, &from, &to); /* a single block by pairs of features */
    for (int b = shared ? from : 0; b < (shared ? to : 1); b++) {
        float *gate = p->qkv + (int64_t)b * width * 16, *image = gate + size * 16, *own = image + size * 16;
        const int first = shared ? 0 : 2 * from, end = shared ? size : 2 * to;
        const F factor = inverse_rms(image, size, m->eps);
        memset(own + 16 * first, 0, 64 * (size_t)(end - first));
        for (int lane = 0; lane < 16 && 16 * b + lane < p->rows; lane++) {
            read_row(&layer->embedded, p->c->ids[16 * b + lane], row);
            for (int i = first; i < end; i++) own[16 * i + lane] = widen(row[i]);
        }
        for (int i = first; i < end; i += 2) {
            F act[2];
            for (int j = 0; j < 2; j++) {
                const F v = rounded(normed16(load16(image + 16 * (i + j)), factor, layer->norm_embedded + i + j, m->round_after_weight));
                const F sum = rounded(add16(v, load16(own + 16 * (i + j))));
                act[j] = activated_times(m, load16(gate + 16 * (i + j)), mul16(sum, set16(0.70710678f)));
            }
            store_u(p->inner + ((int64_t)b * size + i) * 8, paired(act[0], act[1]));
        }
    }
    wait_for_team(&p->barrier, n);
    add_product(p, &layer->embedded_out, layer->norm_added, layer->scale, inputs_of(p, &layer->embedded_out, NULL, p->inner, me, n), me, n);
}

#include "mixture.c"
#include "delta_rule.c"

/* One decoder layer; threads wait for each other after each part. a: scratch of the thread. */
static void run_layer(Pass *p, int index, Attention *a, int me, int n) {
    const Layer *layer = p->m->layers + index;
    int width = layer->qkv.out + layer->rates.out; /* rates: 0 with attention */
    project_heads(p, index, &layer->qkv, 0, width, me, n);
    if (layer->convolution) {
        project_heads(p, index, &layer->rates, layer->qkv.out, width, me, n);
        recur(p, index, me, n);
    } else {
        store_heads(p, index, me, n);
        attend_all(p, index, a, me, n);
    }
    add_product(p, &layer->out, layer->norm_attended, 1, inputs_of(p, &layer->out, NULL, p->attended, me, n), me, n);
    if (layer->gates) {
        mix(p, index, me, n);
        return;
    }
    const uint32_t *inner = gate_and_up(p, index, me, n);
    add_product(p, &layer->down, layer->norm_out, layer->embedded_out.out ? 1 : layer->scale, inner, me, n);
    if (layer->embedded_out.out) add_embedded(p, index, me, n);
}

/* Run layers [lo, hi) of the call in a team of threads. */
static void run_layers(Pass *p, int me, int n) {
    const Call *c = p->c;
    uint8_t *mine = p->scratch + p->own * me;
    if (p->m->layers->embedded_out.out) embed_again(p, me, n);
    for (int index = c->lo; index < c->hi; index++) {
        if (c->taps[index]) {
            int from, to;
            split(p->rows, me, n, &from, &to);
            from_blocks(p->x, from, to, p->m->hidden, c->taps[index]);
        }
        run_layer(p, index, (Attention *)(mine + p->scored), me, n);
    }
}

/* Assign tokens and work items of attention to sequences. */
static void lay_out(Pass *p, const Call *c) {
    int row = 0;
    Item *item = p->items;
    for (int l = 0; l < c->count; l++) {
        p->first[l] = row;
        for (int end = row + c->sequences[l].tokens; row < end; row++) p->sequence_of[row] = l;
    }
    for (Attending *h = p->attending; h < p->attending + BUFFERS; h++) {
        h->items = item;
        for (int l = 0; l < c->count; l++)
            for (int kv = 0; kv < h->heads; kv++)
                for (int block = 0; block < column_blocks_of(p, h, c->sequences + l); block++) *item++ = (Item){l, kv, block};
    }
    for (; row < 16 * p->blocks; row++) p->sequence_of[row] = c->count - 1; /* lanes without a token */
}

/* The maximum number of uncommitted slots of a sequence of the call. */
static int most_behind(const Call *c) {
    int most = 0;
    for (const Sequence *each = c->sequences; each < c->sequences + c->count; each++)
        if (each->trees && each->start + each->tokens - each->committed > most) most = each->start + each->tokens - each->committed;
    return most;
}

/* Allocate memory for passes of `m` over the tokens of `c`, with maps of at most `widest` inputs besides the layers' own.
 * Returns 0, or -1 without memory. Call end_pass in any case. */
static int begin_pass(Pass *p, const Model *m, const Call *c, int widest) {
    memset(p, 0, sizeof *p);
    p->m = m, p->rows = c->tokens, p->blocks = (p->rows + 15) / 16, p->threads = c->threads;
    int total = 0, half = m->rotated / 2, attended = 0, count = 0;
    for (int i = 0; i < BUFFERS && m->buffers[i].count; i++) {
        const int heads = m->buffers[i].count, size = m->buffers[i].size, each = (m->heads * (1 + m->gated) + 2 * heads) * size;
        Attending *h = p->attending + i;
        *h = (Attending){heads, size, m->heads / heads, 0, NULL};
        for (int l = 0; l < c->count; l++) h->count += heads * column_blocks_of(p, h, c->sequences + l);
        total = each > total ? each : total, attended = m->heads * size > attended ? m->heads * size : attended, count += h->count;
    }
    const int embedded = m->layers->embedded_gate.out;
    if (3 * embedded > total) total = 3 * embedded;
    if (m->recurrent) {
        int values = m->value_heads * m->value_dim, mixed = channels_of(m) + values + 2 * in_tiles(m->value_heads);
        total = mixed > total ? mixed : total, attended = values > attended ? values : attended;
    }
    if (widest < m->hidden) widest = m->hidden;
    p->scored = (32 * (size_t)widest + 63) / 64 * 64;
    if (widest < m->inner) widest = m->inner;
    if (widest < attended) widest = attended;
    p->input = p->scored + (sizeof(Attention) + 2 * VECTORS * (size_t)most_behind(c) + 63) / 64 * 64;
    p->mixer = p->input + input_bytes(widest); /* no layout takes more */
    p->own = p->mixer + mixer_bytes(m, c);
    const size_t rows = (size_t)p->rows, blocks = (size_t)p->blocks, shared = blocks > 1 ? blocks : 0, rotated = blocks * half * m->tables;
    const size_t groups = m->experts ? (size_t)most_groups(m, p->rows) : 0, experts = (size_t)m->experts, taken = rows * m->top_k;
    Mixed *g = &p->mixed;
    const struct { void *pointer; size_t bytes; } parts[] = {
        {&p->x, 64 * blocks * m->hidden}, {&p->qkv, 64 * blocks * (total > m->hidden ? total : m->hidden)},
        {&p->cos, 64 * rotated}, {&p->sin, 64 * rotated}, {&p->factors, 128 * blocks}, {&p->attended, 32 * blocks * attended},
        {&p->inner, 32 * (blocks > groups ? blocks : groups) * m->inner}, {&p->queries, 2 * rows * attended},
        {&p->fresh, m->recurrent ? 2 * rows * input_width(m) : 0}, {&p->sequence_of, 64 * blocks}, {&p->first, 4 * (size_t)c->count},
        {&p->items, sizeof(Item) * (size_t)count}, {&p->embedded, embedded ? 32 * blocks * m->hidden : 0},
        {&p->scratch, p->own * c->threads}, {&p->normed, 32 * shared * m->hidden},
        {&p->inputs, shared * input_bytes(widest)}, {&g->group, sizeof(Grouped) * experts}, {&g->count, 4 * experts}, {&g->rest, 4 * experts},
        {&g->logits, experts ? 64 * blocks * in_tiles(m->experts + 1) : 0}, {&g->experts, 4 * taken}, {&g->shares, 4 * taken},
        {&g->row, 64 * groups}, {&g->share, 64 * groups}, {&g->tokens, 4 * groups}, {&g->normed, 32 * groups * m->hidden},
        {&g->inputs, groups * input_bytes(widest)}};
    enum { PARTS = sizeof parts / sizeof *parts };
    size_t bytes = 0;
    for (int i = 0; i < PARTS; i++) bytes += (parts[i].bytes + 63) / 64 * 64;
    if (!(p->memory = allocate(bytes))) return -1;
    uint8_t *at = p->memory;
    for (int i = 0; i < PARTS; at += (parts[i++].bytes + 63) / 64 * 64) memcpy(parts[i].pointer, &at, sizeof at);
    lay_out(p, c);
    memset(p->attended, 0, 32 * blocks * attended);
    memset(p->cos, 0, 64 * rotated);
    memset(p->sin, 0, 64 * rotated);
    for (int table = 0; table < m->tables; table++)
        for (int r = 0; r < p->rows; r++)
            for (int i = 0; i < half; i++) {
                int64_t to = (((int64_t)table * p->blocks + r / 16) * half + i) * 16 + r % 16, from = c->positions[r] * 2 * half + i;
                p->cos[to] = c->rotary[table][from], p->sin[to] = c->rotary[table][from + half];
            }
    return 0;
}

static void end_pass(Pass *p) { free(p->memory); }

/* Let a pass read a call's cached tokens. Returns 0, or -1 without memory. Call unbind_cache in any case. */
static int bind_cache(Pass *p, const Call *c) {
    p->c = c, p->branches = NULL;
    memset(&p->barrier, 0, sizeof p->barrier);
    return find_branches(p) ? -1 : 0;
}

static void unbind_cache(Pass *p) {
    for (int l = 0; p->branches && l < p->c->count; l++) free(p->branches[l].parent);
    free(p->branches);
}

/* Run layers [lo, hi) of a call on all its tokens at once. Returns 0, or -1 without memory; hidden states and cached slots are
 * undefined then. */
EXPORT int KERNEL(layers)(const Model *m, const Call *c) {
    Pass p;
    int failed = begin_pass(&p, m, c, 0) || bind_cache(&p, c) ? -1 : 0;
    if (!failed) {
        to_blocks(c->x, p.rows, m->hidden, p.x);
#pragma omp parallel num_threads(c->threads)
        {
            int me = omp_get_thread_num(), n = omp_get_num_threads(), from, to;
            enter_tiles();
            run_layers(&p, me, n);
            split(p.rows, me, n, &from, &to);
            from_blocks(p.x, from, to, m->hidden, c->x);
            leave_tiles();
        }
        absorbed(&p);
        if (c->taps[c->hi]) memcpy(c->taps[c->hi], c->x, 2 * (size_t)p.rows * m->hidden);
    }
    if (p.c) unbind_cache(&p);
    end_pass(&p);
    return failed;
}

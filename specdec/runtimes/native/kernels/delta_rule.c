/* Recurrent layers: a short convolution over the last inputs, and the gated delta rule (arXiv 2412.06464). A value head's state, a matrix
 * of keys by values, decays with each token, which then corrects the value of its key.
 *
 * The tokens of a pass are run one after another, so that a token's result does not depend on those beside it. Columns of a state are
 * independent of one another: a few of them stay in the cache while all tokens run. The state that a sequence keeps is that after its
 * committed tokens; the inputs of later ones are kept beside it. Those that are accepted ("pending") run again when the next tokens do,
 * and change it. Each branch of a tree starts with the state of the token before it. */

enum { ROOT = -1, SKIPPED = -2 };
enum { COLUMNS = WIDE / 4, AT_ONCE = 64, MOST_TAPS = 8 }; /* vectors of columns, as many as registers hold; tokens of a long chain */

typedef struct {                   /* tokens of a head, prepared: [tokens][...] */
    float *q, *k, *v, *out;        /* [key_dim], [key_dim], [value_dim], [value_dim] */
    float *decay, *beta, *qk;      /* factor of the old state; strength of writing; q k */
    float *states;                 /* [states of branches][COLUMNS][key_dim][16] */
} Steps;

/* The maximum number of tokens that a thread prepares for a sequence, and of states that its branches take. */
static void most_steps(const Model *m, const Sequence *sequence, int *steps, int *states) {
    int pending = 0, count = sequence->held + sequence->tokens;
    for (int l = 0; l < m->recurrent; l++)
        if (sequence->pending[l] > pending) pending = sequence->pending[l];
    *states = sequence->ahead ? 0 : count / 2 + 1; /* a token that has a state of its own is not the last of its branch */
    *steps = pending + (sequence->ahead && count > AT_ONCE ? AT_ONCE : count);
}

/* Where the parts of `Steps` are in a thread's scratch; returns its bytes. */
static size_t lay_out_steps(const Model *m, size_t steps, size_t states, uint8_t *at, Steps *s) {
    const size_t sizes[] = {m->key_dim * steps, m->key_dim * steps, m->value_dim * steps, m->value_dim * steps, steps, steps, steps,
        16 * COLUMNS * m->key_dim * states};
    float **parts[] = {&s->q, &s->k, &s->v, &s->out, &s->decay, &s->beta, &s->qk, &s->states};
    size_t bytes = 0;
    for (int i = 0; i < 8; i++) {
        if (at) *parts[i] = (float *)(at + bytes);
        bytes += (4 * sizes[i] + 63) / 64 * 64;
    }
    return bytes;
}

/* Bytes of a thread's scratch for the recurrent layers of a call. */
static size_t mixer_bytes(const Model *m, const Call *c) {
    size_t most = 0;
    Steps unused;
    for (int l = 0; m->recurrent && l < c->count; l++) {
        int steps, states;
        most_steps(m, c->sequences + l, &steps, &states);
        size_t bytes = lay_out_steps(m, (size_t)steps, (size_t)states, NULL, &unused);
        most = bytes > most ? bytes : most;
    }
    return most;
}

/* How the uncommitted tokens of each sequence follow one another. Returns 0, or -1 without memory. */
static int find_branches(Pass *p) {
    const Call *c = p->c;
    int layer = c->lo;
    while (layer < c->hi && !p->m->layers[layer].convolution) layer++;
    if (layer == c->hi) return 0;
    p->branches = calloc((size_t)c->count, sizeof *p->branches);
    for (int l = 0; p->branches && l < c->count; l++) {
        const Sequence *sequence = c->sequences + l;
        const uint8_t *tree = sequence->trees ? sequence->trees[c->window[layer]] : NULL;
        int count = sequence->held + sequence->tokens, states = 0;
        Branches *b = p->branches + l;
        if (!count || sequence->ahead) continue;
        b->parent = allocate(16 * (size_t)count);
        if (!b->parent) return -1;
        int32_t *last = b->parent + 3 * count; /* the last token after each */
        b->from = b->parent + count, b->to = b->from + count, b->count = count;
        for (int u = 0; u < count; u++) b->parent[u] = tree ? SKIPPED : u - 1, last[u] = ROOT;
        for (int u = sequence->held; tree && u < count; u++, tree += count) {
            /* the last two tokens that it sees, the last one being itself, or one that it takes the place of */
            int before = ROOT, at = ROOT;
            for (int s = 0; s < count; s++) {
                if (!tree[s]) continue;
                if (s != u) b->parent[s] = at;
                before = at, at = s;
            }
            b->parent[u] = before;
        }
        for (int u = 0; u < count; u++)
            if (b->parent[u] >= 0) last[b->parent[u]] = u;
        for (int u = 0; u < count; u++) {
            int parent = b->parent[u];
            if (parent == SKIPPED) continue;
            b->from[u] = parent == ROOT ? 0 : b->to[parent];
            b->to[u] = last[u] == ROOT ? 0 : parent != ROOT && last[parent] == u ? b->from[u] : ++states;
        }
    }
    return p->branches ? 0 : -1;
}

/* The inputs of a token of a sequence in a layer. u: below 0: -1 is the last committed one. */
static const bf16 *inputs_at(const Pass *p, const Sequence *sequence, const Layer *layer, int number, int pending, int u) {
    const Model *m = p->m;
    const bf16 *kept = sequence->inputs + (int64_t)layer->place * sequence->slots * input_width(m);
    if (u >= sequence->held) return p->fresh + (int64_t)(p->first[number] + u - sequence->held) * input_width(m);
    if (u >= 0) return kept + (int64_t)u * input_width(m);
    if (u >= -pending) return kept + (int64_t)(pending + u) * input_width(m);
    return (const bf16 *)(sequence->states + layer->place * state_bytes(m) + matrices_bytes(m))
        + (int64_t)(m->taps - 1 + pending + u) * channels_of(m);
}

/* out = silu(the convolution) of `count` channels from `at` on. rows: inputs of a token and of the tokens before it, newest first. */
static void convolve(const Model *m, const Layer *layer, const bf16 *const *rows, int at, int count, float *out) {
    const int channels = channels_of(m);
    for (int i = at; i < at + count; i += 16, out += 16) {
        F sum = zero16();
        for (int tap = m->taps - 1; tap >= 0; tap--)
            sum = fma16(load_bf16(rows[tap] + i), load16(layer->convolution + (m->taps - 1 - tap) * channels + i), sum);
        store16(out, mul16(sum, sigmoid16(sum)));
    }
}

/* a b */
static float dot(const float *a, const float *b, int count) {
    F sum = zero16();
    for (int i = 0; i < count; i += 16) sum = fma16(load16(a + i), load16(b + i), sum);
    return sum1(sum);
}

static void scale_all(float *x, int count, float factor) {
    for (int i = 0; i < count; i += 16) store16(x + i, mul16(load16(x + i), set16(factor)));
}

/* Prepare token `i` of a head. rows: as in convolve. */
static void prepare(const Model *m, const Layer *layer, const bf16 *const *rows, int head, const Steps *s, int i) {
    const int d = m->key_dim, key_head = head / (m->value_heads / m->key_heads), keys = m->key_heads * d, rates = channels_of(m) + head;
    float *q = s->q + (int64_t)i * d, *k = s->k + (int64_t)i * d;
    convolve(m, layer, rows, key_head * d, d, q);
    convolve(m, layer, rows, keys + key_head * d, d, k);
    convolve(m, layer, rows, 2 * keys + head * m->value_dim, m->value_dim, s->v + (int64_t)i * m->value_dim);
    scale_all(q, d, 1 / __builtin_sqrtf((dot(q, q, d) + 1e-6f) * (float)d));
    scale_all(k, d, 1 / __builtin_sqrtf(dot(k, k, d) + 1e-6f));
    s->qk[i] = dot(q, k, d);
    float write = widen(rows[0][rates]), forget = widen(rows[0][rates + in_tiles(m->value_heads)]);
    s->beta[i] = 1 / (1 + exp1(write < -80 ? 80 : -write));
    s->decay[i] = exp1(layer->decay[head] * softplus1(forget + layer->decay_bias[head]));
}

/* One token of a head, for 16 `wide` columns. from, to: the state before and after it (NULL: it is not needed), [wide][key_dim][16].
 * v, out: its values, and the result (NULL: it is not needed). */
INLINE void step(int wide, int d, const Steps *s, int i, const float *from, float *to, const float *v, float *out) {
    const float *q = s->q + (int64_t)i * d, *k = s->k + (int64_t)i * d;
    F known[4], read[4], decay = set16(s->decay[i]);
    for (int c = 0; c < wide; c++) known[c] = read[c] = zero16();
    if (out)
        for (int j = 0; j < d; j++)
            for (int c = 0; c < wide; c++) {
                F state = load16(from + 16 * (c * d + j));
                known[c] = fma16(state, set16(k[j]), known[c]), read[c] = fma16(state, set16(q[j]), read[c]);
            }
    else
        for (int j = 0; j < d; j++)
            for (int c = 0; c < wide; c++) known[c] = fma16(load16(from + 16 * (c * d + j)), set16(k[j]), known[c]);
    for (int c = 0; c < wide; c++) known[c] = mul16(fnma16(known[c], decay, load16(v + 16 * c)), set16(s->beta[i])); /* what it corrects */
    for (int c = 0; out && c < wide; c++) store16(out + 16 * c, fma16(known[c], set16(s->qk[i]), mul16(read[c], decay)));
    if (to)
        for (int j = 0; j < d; j++)
            for (int c = 0; c < wide; c++) {
                int at = 16 * (c * d + j);
                store16(to + at, fma16(known[c], set16(k[j]), mul16(load16(from + at), decay)));
            }
}

/* The columns of `wide` vectors from number `column` on: `pending` tokens change `state`; then come `count` ones of `branches` or, if it is
 * NULL, of a chain, which writes the state after them to `ahead`. Results of tokens before number `quiet` are not needed. */
INLINE void run_columns(int wide, const Model *m, const Steps *s, int column, float *state, float *ahead, int pending,
    const Branches *branches, int count, int quiet) {
    const int d = m->key_dim, size = 16 * COLUMNS * d;
    for (int i = 0; i < pending; i++) step(wide, d, s, i, state, state, s->v + (int64_t)i * m->value_dim + 16 * column, NULL);
    for (int u = 0; u < count; u++) {
        int i = pending + u;
        int64_t at = (int64_t)i * m->value_dim + 16 * column;
        if (branches && branches->parent[u] == SKIPPED) continue;
        const float *from = !branches ? u ? ahead : state : branches->from[u] ? s->states + (int64_t)(branches->from[u] - 1) * size : state;
        float *to = !branches ? ahead : branches->to[u] ? s->states + (int64_t)(branches->to[u] - 1) * size : NULL;
        step(wide, d, s, i, from, to, s->v + at, u < quiet ? NULL : s->out + at);
    }
}

/* The gated norm of the results of a token, from number `row` of the pass, to the input of the layer's last map. */
static void put_mixed(const Pass *p, const Layer *layer, int head, int row, float *out) {
    const Model *m = p->m;
    const int d = m->value_dim, width = layer->qkv.out + layer->rates.out, each = m->value_heads / m->key_heads;
    const int place = layer->tiled ? head % each * m->key_heads + head / each : head;
    const float *gate = p->qkv + ((int64_t)(row / 16) * width + channels_of(m) + head * d) * 16 + row % 16;
    uint32_t *lane = p->attended + ((int64_t)(row / 16) * m->value_heads * d + place * d) * 8 + row % 16;
    for (int i = 0; i < d; i += 16) store16(out + i, rounded(load16(out + i)));
    const F factor = set16(1 / __builtin_sqrtf(dot(out, out, d) / (float)d + m->eps));
    for (int i = 0; i < d; i += 16) {
        F v = rounded(mul16(rounded(mul16(load16(out + i), factor)), load16(layer->norm_mixed + i))), g = column16(gate + 16 * i);
        put_lane(lane + 8 * i, mul16(v, mul16(g, sigmoid16(g))));
    }
}

/* Run a value head of a sequence. */
static void run_head(const Pass *p, int index, int number, int head, uint8_t *scratch) {
    const Model *m = p->m;
    const Layer *layer = m->layers + index;
    const Sequence *sequence = p->c->sequences + number;
    const Branches *branches = sequence->ahead ? NULL : p->branches + number;
    const int64_t offset = layer->place * state_bytes(m), own = (int64_t)head * m->value_dim * m->key_dim;
    float *state = (float *)(sequence->states + offset) + own, *ahead = branches ? NULL : (float *)(sequence->ahead + offset) + own;
    int total = sequence->held + sequence->tokens, pending = sequence->pending[layer->place], most, states;
    Steps s;
    if (!sequence->tokens) return;
    most_steps(m, sequence, &most, &states);
    lay_out_steps(m, (size_t)most, (size_t)states, scratch, &s);
    for (int begin = 0; begin < total; begin += branches ? total : AT_ONCE) {
        int count = branches || total - begin < AT_ONCE ? total - begin : AT_ONCE, again = begin ? 0 : pending;
        for (int i = 0; i < again + count; i++) {
            int u = begin + i - again;
            const bf16 *rows[MOST_TAPS];
            if (branches && u >= 0 && branches->parent[u] == SKIPPED) continue;
            for (int tap = 0, at = u; tap < m->taps; tap++, at = at >= 0 && branches ? branches->parent[at] : at - 1)
                rows[tap] = inputs_at(p, sequence, layer, number, pending, at);
            prepare(m, layer, rows, head, &s, i);
        }
        float *from = begin ? ahead : state;
        for (int column = 0, left = m->value_dim / 16; left; ) {
            int64_t at = (int64_t)column * m->key_dim * 16;
            float *to = ahead ? ahead + at : NULL;
            int wide = left >= COLUMNS ? COLUMNS : left >= 2 ? 2 : 1, quiet = sequence->held - begin;
            if (wide == 4) run_columns(4, m, &s, column, from + at, to, again, branches, count, quiet);
            else if (wide == 2) run_columns(2, m, &s, column, from + at, to, again, branches, count, quiet);
            else run_columns(1, m, &s, column, from + at, to, again, branches, count, quiet);
            column += wide, left -= wide;
        }
        for (int u = begin; u < begin + count; u++)
            if (u >= sequence->held)
                put_mixed(p, layer, head, p->first[number] + u - sequence->held, s.out + (int64_t)(again + u - begin) * m->value_dim);
    }
}

/* Set the stored last inputs of the convolution, channels [from, to), to those after `count` more tokens with the inputs `rows`. */
static void move_tail(const Model *m, const bf16 *tail, const bf16 *rows, int count, int from, int to, bf16 *out) {
    const int channels = channels_of(m), more = m->taps - 1;
    for (int i = 0; i < more && from < to; i++) {
        int at = count - more + i;
        const bf16 *source = at < 0 ? tail + (int64_t)(i + count) * channels : rows + (int64_t)at * input_width(m);
        memmove(out + (int64_t)i * channels + from, source + from, 2 * (size_t)(to - from));
    }
}

/* p->attended = the mixer of a recurrent layer, for the projected inputs in p->qkv. */
static void recur(Pass *p, int index, int me, int n) {
    const Model *m = p->m;
    const Call *c = p->c;
    const Layer *layer = m->layers + index;
    const int width = input_width(m), total = layer->qkv.out + layer->rates.out, mixed = channels_of(m) / 16;
    uint8_t *scratch = p->scratch + p->own * me + p->mixer;
    int from, to;
    split(mixed + layer->rates.out / 16, me, n, &from, &to);
    for (int t = from; t < to; t++) { /* the gates between the channels and the rates are read where they are */
        const float *fm = p->qkv + (t < mixed ? 256 * t : 16 * layer->qkv.out + 256 * (t - mixed));
        for (int r = 0; r < p->rows; r++)
            store_h(p->fresh + (int64_t)r * width + 16 * t, narrow16(column16(fm + (int64_t)(r / 16) * total * 16 + r % 16)));
    }
    wait_for_team(&p->barrier, n);
    split(c->count * m->value_heads, me, n, &from, &to);
    for (int item = from; item < to; item++) run_head(p, index, item / m->value_heads, item % m->value_heads, scratch);
    wait_for_team(&p->barrier, n);
    split(width / 16, me, n, &from, &to); /* what is kept, by columns; the team waits in what follows */
    from *= 16, to *= 16;
    int end = to < channels_of(m) ? to : channels_of(m);
    for (int l = 0; l < c->count; l++) {
        const Sequence *sequence = c->sequences + l;
        const int64_t offset = layer->place * state_bytes(m) + matrices_bytes(m);
        bf16 *tail = (bf16 *)(sequence->states + offset), *kept = sequence->inputs + (int64_t)layer->place * sequence->slots * width;
        const bf16 *fresh = p->fresh + (int64_t)p->first[l] * width;
        if (!sequence->tokens) continue;
        move_tail(m, tail, kept, sequence->pending[layer->place], from, end, tail);
        if (sequence->ahead) move_tail(m, tail, fresh, sequence->tokens, from, end, (bf16 *)(sequence->ahead + offset));
        for (int r = 0; !sequence->ahead && r < sequence->tokens; r++)
            memcpy(kept + (int64_t)(sequence->held + r) * width + from, fresh + (int64_t)r * width + from, 2 * (size_t)(to - from));
    }
}

/* After a pass: what was pending is in the states. */
static void absorbed(Pass *p) {
    for (int index = p->c->lo; index < p->c->hi; index++)
        for (int l = 0; p->m->layers[index].convolution && l < p->c->count; l++)
            if (p->c->sequences[l].tokens) p->c->sequences[l].pending[p->m->layers[index].place] = 0;
}

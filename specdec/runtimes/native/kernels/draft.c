/* Drafting level by level along a draft path of projections and layers: a tree for one sequence, or a chain with siblings for
 * each of several. */

#include "../calibrate.h"
#include "../gumbel.h"

enum { MOST_STAGES = 8, MOST_WIDTH = 16 };

typedef struct {        /* the best of a thread's outputs, by lane */
    float most[16] __attribute__((aligned(64))), sum[16] __attribute__((aligned(64))), floor[16] __attribute__((aligned(64)));
    float values[16][MOST_WIDTH];
    int32_t ids[16][MOST_WIDTH];
} Best;

static const float NEVER = -1e30f; /* logit of a token that is not allowed */

/* Set, for each of `some` outputs from number `first` on, the lanes in which it is allowed; return the lanes with any. */
static uint32_t allowed_lanes(const TreeDraft *g, int rows, int first, int some, uint32_t *lanes) {
    uint32_t any = 0;
    for (int o = 0; o < some; o++) {
        int64_t token = g->tokens ? g->tokens[first + o] : first + o;
        lanes[o] = 0;
        for (int r = 0; r < rows; r++) lanes[o] |= (uint32_t)(g->allowed[r] && g->allowed[r][token]) << r;
        any |= lanes[o];
    }
    return any;
}

static void insert_candidate(Best *best, int lane, int count, float value, int32_t id) {
    float *values = best->values[lane];
    int32_t *ids = best->ids[lane], at = count - 1;
    for (; at > 0 && value > values[at - 1]; at--) values[at] = values[at - 1], ids[at] = ids[at - 1];
    values[at] = value, ids[at] = id;
    best->floor[lane] = values[count - 1];
}

/* before, carried: feature_major; projected: out, [rows, hidden]. */
static void project(Pass *p, const Linear *map, const float *before, const float *carried, float eps, bf16 *projected, int me, int n) {
    uint8_t *mine = p->scratch + p->own * me;
    uint32_t *normed = (uint32_t *)mine;
    int hidden = p->m->hidden, from, to;
    Work work = {&p->barrier, hidden / 16, 1, me, n};
    float sums[256] __attribute__((aligned(64)));
    norm(p->x, NULL, hidden, eps, 0, normed);
    norm(before, NULL, hidden, eps, 0, normed + 8 * hidden);
    if (carried) norm(carried, NULL, hidden, eps, 0, normed + 16 * hidden);
    const uint32_t *input = input_of(map, normed, p->rows, mine + p->input);
    wait_for_team(&p->barrier, n);
    for (int t; (t = next_item(&work)) >= 0;) {
        product(map, t, input, p->rows, sums);
        for (int o = 0; o < 16; o++) store16(p->x + 16 * (16 * t + o), rounded(load16(sums + 16 * o)));
    }
    wait_for_team(&p->barrier, n);
    split(p->rows, me, n, &from, &to);
    from_blocks(p->x, from, to, hidden, projected);
}

/* Of how many outputs the best ones are found: noise chooses among these. */
static int found_of(const TreeDraft *g) { return g->sampled ? MOST_WIDTH : g->width; }

/* The best next tokens of each lane among this thread's outputs. */
static void read_out(Pass *p, const TreeDraft *g, Best *best, int me, int n) {
    const int count = found_of(g);
    uint8_t *mine = p->scratch + p->own * me;
    float sums[256] __attribute__((aligned(64)));
    uint32_t lanes[16];
    F most = set16(NEVER), sum = zero16();
    for (int lane = 0; lane < 16; lane++) {
        best->floor[lane] = NEVER;
        for (int i = 0; i < count; i++) best->values[lane][i] = NEVER, best->ids[lane][i] = 0;
    }
    norm(p->x, g->norm, p->m->hidden, g->eps, p->m->round_after_weight, (uint32_t *)mine);
    for (int h = 0; h < 2 && g->head[h]; h++) {
        const uint32_t *input = input_of(g->head[h], (uint32_t *)mine, p->rows, mine + p->input);
        int from, to, first = h ? g->outputs[0] : 0;
        split((g->outputs[h] + 15) / 16, me, n, &from, &to);
        for (int t = from; t < to; t++) {
            int some = g->outputs[h] - 16 * t < 16 ? g->outputs[h] - 16 * t : 16;
            if (g->mask && !allowed_lanes(g, p->rows, first + 16 * t, some, lanes)) continue;
            product(g->head[h], t, input, p->rows, sums);
            if (g->mask)
                for (int o = 0; o < some; o++)
                    for (int r = 0; r < p->rows; r++)
                        if (!(lanes[o] >> r & 1)) sums[16 * o + r] = NEVER;
            for (int r = 0; h && g->forbidden && r < p->rows; r++)
                for (int o = 0; o < some; o++)
                    if (g->forbidden[(int64_t)r * g->outputs[1] + 16 * t + o]) sums[16 * o + r] = NEVER;
            F top = most;
            for (int o = 0; o < some; o++) top = max16(top, load16(sums + 16 * o));
            sum = mul16(sum, exp16(sub16(most, top)));
            most = top;
            for (int o = 0; o < some; o++) {
                F v = load16(sums + 16 * o);
                sum = add16(sum, exp16(sub16(v, most)));
                uint32_t good = bits16(more16(v, load16(best->floor))) & ((1u << p->rows) - 1);
                for (; good; good &= good - 1) {
                    int lane = __builtin_ctz(good);
                    insert_candidate(best, lane, count, sums[16 * o + lane], first + 16 * t + o);
                }
            }
        }
    }
    store16(best->most, most), store16(best->sum, sum);
}

/* Merge one lane of all threads into the first thread's, as log-probabilities, or NEVER. */
static void merge_candidates(Best *best, int lane, int count, int team) {
    float most = best->most[lane], sum = 0;
    for (int t = 1; t < team; t++) most = best[t].most[lane] > most ? best[t].most[lane] : most;
    for (int t = 0; t < team; t++) sum += best[t].sum[lane] * __builtin_expf(best[t].most[lane] - most);
    for (int t = 1; t < team; t++)
        for (int i = 0; i < count && best[t].values[lane][i] > best->floor[lane]; i++)
            insert_candidate(best, lane, count, best[t].values[lane][i], best[t].ids[lane][i]);
    for (int i = 0; i < count && best->values[lane][i] > NEVER; i++) best->values[lane][i] -= most + __builtin_logf(sum);
}

/* Let the best outputs of a lane, log-probabilities, compete with their noise: an output is likely as far as it leads. Top-k, top-p
 * and min-p count these few alone, which have nearly all of the probability. */
static void draw_candidates(const TreeDraft *g, Best *best, int lane, const Sampled *s, int64_t position) {
    float *values = best->values[lane], share[MOST_WIDTH], noisy[MOST_WIDTH], mass = 0, above = 0, top = NEVER, sum = 0;
    int32_t ids[MOST_WIDTH], some = 0;
    memcpy(ids, best->ids[lane], sizeof ids);
    for (; some < MOST_WIDTH && values[some] > NEVER; some++) {
        const float gap = (values[some] - values[0]) * s->sharpness;
        share[some] = !s->top_k || some < s->top_k ? __builtin_expf(gap) : 0;
        mass += share[some];
        noisy[some] = gap + gumbel(s->seed, s->stream, position, g->tokens ? g->tokens[ids[some]] : ids[some]);
        top = noisy[some] > top ? noisy[some] : top;
    }
    best->floor[lane] = NEVER;
    for (int i = 0; i < MOST_WIDTH; i++) values[i] = NEVER;
    for (int i = 0; i < some; above += share[i++]) {
        sum += __builtin_expf(noisy[i] - top);
        const int left = (s->top_p >= 1 || above < s->top_p * mass) && share[i] > 0 && share[i] >= s->min_p;
        if (left && noisy[i] > best->floor[lane]) insert_candidate(best, lane, g->width, noisy[i], ids[i]);
    }
    for (int i = 0; i < g->width && values[i] > NEVER; i++) values[i] -= top + __builtin_logf(sum);
}

typedef struct { int32_t token, place; float raw, p; } Candidate; /* place: of the given tree, or -1 */

/* The candidates after a node, the likeliest first: those of the node's lane, and those after node `place` of the given tree. */
static int candidates_of(const TreeDraft *g, const Best *best, int lane, int sequence, int place, Candidate *found) {
    const float *table = g->tables ? g->tables + 3 * KNOTS * sequence : NULL;
    const Given *given = g->given ? g->given + sequence : NULL;
    float p[MOST_WIDTH];
    int count = 0;
    for (int i = 0; i < g->width && best->values[lane][i] > NEVER; i++, count++) {
        const int32_t id = best->ids[lane][i];
        const float raw = __builtin_expf(best->values[lane][i]);
        found[i] = (Candidate){g->tokens ? (int32_t)g->tokens[id] : id, -1, raw, 0};
        p[i] = calibrated(table, raw);
    }
    const int heads = count;
    for (int n = 0; given && place >= 0 && n < given->count; n++) {
        if (given->parents[n] != place) continue;
        int at = 0;
        while (at < count && found[at].token != given->tokens[n]) at++;
        if (at == MOST_WIDTH) continue;
        if (at == count) found[count] = (Candidate){given->tokens[n], -1, 0, 0}, p[count++] = 0;
        const float other = calibrated(table ? table + (at >= heads && heads ? 2 : 1) * KNOTS : NULL, given->p[n]);
        found[at].place = n + 1, p[at] = other > p[at] ? other : p[at];
    }
    share(p, count);
    for (int i = 0; i < count; i++) {
        Candidate next = found[i];
        int at = i;
        next.p = p[i];
        for (; at > 0 && next.p > found[at - 1].p; at--) found[at] = found[at - 1];
        found[at] = next;
    }
    return count;
}

/* The pass of a level: `x` [rows, hidden] through all stages to `best`. states: [stages + 1][MOST_WIDTH][hidden], the result of
 * each projection and the final states; `before`: those of the parents. Returns 0, or -1 without memory. */
static int run_level(const TreeDraft *g, const Call *calls, const bf16 *x, const bf16 *before, bf16 *states, Best *best, float *fm) {
    Pass p, passes[MOST_STAGES];
    const Model *m = g->stage[0].model;
    int aimed = 0, widest = 3 * m->hidden, threads = calls->threads, team = 1; /* there may be fewer than we ask for */
    int64_t block = (int64_t)m->hidden * 16, final = g->stages * block;
    int failed = begin_pass(&p, m, calls, widest);
    for (; !failed && aimed < g->stages; aimed++) {
        passes[aimed] = p;
        if (!g->stage[aimed].call) continue;
        passes[aimed].m = g->stage[aimed].model;
        failed = bind_cache(passes + aimed, calls + aimed);
    }
    if (!failed) {
        to_blocks(x, p.rows, m->hidden, p.x);
        for (int i = 0; i <= g->stages; i++) to_blocks(before + i * block, p.rows, m->hidden, fm + i * block);
#pragma omp parallel num_threads(threads)
        {
            int me = omp_get_thread_num(), n = omp_get_num_threads(), from, to;
            if (!me) team = n;
            enter_tiles();
            for (int i = 0; i < g->stages; i++) {
                project(passes + i, g->stage[i].projection, fm + final, g->stage[i].call ? fm + i * block : NULL, g->unit_eps,
                    states + i * block, me, n);
                if (g->stage[i].call) run_layers(passes + i, me, n);
            }
            split(p.rows, me, n, &from, &to);
            from_blocks(p.x, from, to, m->hidden, states + final);
            read_out(&p, g, best + me, me, n);
            leave_tiles();
        }
        for (int i = 0; i < aimed; i++)
            if (g->stage[i].call) absorbed(passes + i);
        for (int r = 0; r < p.rows; r++) merge_candidates(best, r, found_of(g), team);
    }
    for (int i = 0; i < aimed; i++)
        if (g->stage[i].call) unbind_cache(passes + i);
    end_pass(&p);
    return failed;
}

/* Grow a tree, or chains with siblings. Each sequence needs free slots for all tokens that get children. Returns the number of
 * candidates, or -1 without memory or masks. */
EXPORT int KERNEL(draft_tree)(const TreeDraft *g) {
    const Model *m = g->stage[0].model;
    const Call *like = g->stage[0].call;
    int width = g->width, count = g->sequences, hidden = m->hidden, found = 0, rows = count, drafted = 0, failed = 0;
    int64_t block = (int64_t)hidden * 16;
    size_t states = 2 * (size_t)block * (g->stages + 1), most = (size_t)g->levels * width;
    Call calls[MOST_STAGES];
    Sequence sequences[MOST_STAGES][MOST_WIDTH];
    int64_t positions[MOST_WIDTH];
    int32_t tokens[MOST_WIDTH], nodes[MOST_WIDTH] = {0}, places[MOST_WIDTH] = {0};
    int32_t origin[MOST_WIDTH * MOST_WIDTH] = {0}, given[MOST_WIDTH * MOST_WIDTH] = {0};
    float score[MOST_WIDTH] = {0};
    bf16 *x = allocate(2 * block), *before = allocate(states), *now = allocate(states);
    float *fm = allocate(2 * states);
    Best *best = allocate(sizeof(Best) * like->threads);
    uint8_t *paths = calloc(2 * MOST_WIDTH, most + 1); /* of this and the next level: which drafted tokens lie on a path */
    uint8_t *tree = allocate((size_t)width * (most + 1));
    /* by window kind: all equal, as no window is narrower than a draft */
    const uint8_t **trees = calloc((size_t)like->windows, sizeof *trees);
    failed = !(x && before && now && fm && best && paths && tree && trees);
    for (int i = 0; !failed && i < g->stages; i++) {
        memset(before + i * block, 0, 2 * (size_t)count * hidden);
        if (!g->stage[i].call) continue;
        calls[i] = *g->stage[i].call;
        memcpy(sequences[i], calls[i].sequences, count * sizeof(Sequence));
        calls[i].sequences = sequences[i];
        memcpy(before + i * block, g->stage[i].carried, 2 * (size_t)count * hidden);
    }
    if (!failed) memcpy(before + g->stages * block, g->final, 2 * (size_t)count * hidden);
    memcpy(tokens, g->roots, count * sizeof *tokens);
    for (int l = 0; l < count; l++) nodes[l] = -l;
    for (int level = 0; !failed && level < g->levels; level++) {
        int behind = drafted + rows;
        uint8_t *path = paths + (level & 1 ? MOST_WIDTH * (most + 1) : 0), *next = paths + (level & 1 ? 0 : MOST_WIDTH * (most + 1));
        for (int w = 0; w < like->windows; w++) trees[w] = tree;
        for (int r = 0; count == 1 && r < rows; r++) {
            path[r * (most + 1) + drafted + r] = 1;
            memcpy(tree + (size_t)r * behind, path + r * (most + 1), (size_t)behind);
        }
        for (int r = 0; r < rows; r++) {
            positions[r] = like->positions[count == 1 ? 0 : r] + level;
            read_row(g->embedding, tokens[r], x + (int64_t)r * hidden);
        }
        for (int i = 0; i < g->stages; i++) {
            if (!g->stage[i].call) continue;
            calls[i].tokens = rows, calls[i].positions = positions, calls[i].ids = tokens;
            for (int l = 0; l < count; l++) {
                Sequence *sequence = sequences[i] + l;
                int committed = g->stage[i].call->sequences[l].start;
                sequence->tokens = count == 1 ? rows : 1, sequence->held = count == 1 ? drafted : level,
                    sequence->start = committed + sequence->held;
                sequence->committed = count == 1 ? committed : sequence->start, sequence->trees = count == 1 ? trees : NULL;
            }
        }
        failed = (g->mask && g->mask(rows, nodes)) || run_level(g, calls, x, before, now, best, fm);
        if (failed) break;
        int begun = found, chosen[MOST_WIDTH], some = 0;
        for (int r = 0; r < rows; r++) {
            const Sampled *sampled = g->sampled ? g->sampled + (count > 1 ? r : 0) : NULL;
            if (sampled && sampled->sharpness > 0) draw_candidates(g, best, r, sampled, sampled->place + level);
            Candidate own[MOST_WIDTH];
            const int children = candidates_of(g, best, r, count > 1 ? r : 0, places[r], own);
            if (count > 1 && children) chosen[some++] = found; /* each sequence continues its chain */
            for (int i = 0; i < children; i++, found++) {
                origin[found - begun] = r, given[found - begun] = own[i].place;
                g->scores[found] = score[r] + __builtin_logf(own[i].p > 1e-9f ? own[i].p : 1e-9f);
                g->ids[found] = own[i].token, g->parents[found] = nodes[r], g->raw[found] = own[i].raw;
            }
        }
        if (count > 1 && some < rows) { /* a sequence has no finite logit */
            found = begun;
            break;
        }
        for (int i = begun; count == 1 && i < found; i++) { /* the likeliest of them; of equal ones the first */
            if (some == width && g->scores[i] <= g->scores[chosen[width - 1]]) continue;
            int at = some < width ? some++ : width - 1;
            for (; at > 0 && g->scores[i] > g->scores[chosen[at - 1]]; at--) chosen[at] = chosen[at - 1];
            chosen[at] = i;
        }
        if (!some || level + 1 == g->levels) break;
        float gain = 0;
        for (int i = 0; i < some; i++) {
            float beyond = g->rates[level + 1] * __builtin_expf(g->scores[chosen[i]]) - g->node;
            if (beyond > 0) gain += beyond;
            else if (count == 1 && i) { /* nor do the nodes after it get children */
                some = i;
                break;
            }
        }
        if (gain < g->level) break;
        for (int r = 0; r < some; r++) {
            int parent = origin[chosen[r] - begun];
            if (count == 1) {
                memset(next + r * (most + 1), 0, most + 1);
                memcpy(next + r * (most + 1), path + parent * (most + 1), (size_t)(drafted + rows));
            }
            for (int i = 0; i <= g->stages; i++)
                memcpy(before + i * block + (int64_t)r * hidden, now + i * block + (int64_t)parent * hidden, 2 * (size_t)hidden);
            tokens[r] = g->ids[chosen[r]], nodes[r] = chosen[r] + 1, score[r] = g->scores[chosen[r]], places[r] = given[chosen[r] - begun];
        }
        drafted += rows, rows = some;
    }
    free(x), free(before), free(now), free(fm), free(best), free(paths), free(tree), free(trees);
    return failed ? -1 : found;
}

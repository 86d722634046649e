/* The loops of kernels.c for one working type and one kind of processor. */

#define EACH(expression)                                                                           \
    do {                                                                                           \
        PORTABLE_LOOP                                                                              \
        for (ptrdiff_t i = 0; i < n; i++) {                                                        \
            dst[i] = (expression);                                                                 \
        }                                                                                          \
    } while (0)

/* An expression in `in`, the i-th element of input k, whatever its dtype. */
#define EACH_INPUT(expression)                                                                     \
    do {                                                                                           \
        const char *data = call->inputs[now->k];                                                   \
        float floats[CHUNK];                                                                       \
        switch (call->dtypes[now->k]) {                                                            \
        case F64: {                                                                                \
            const double *from = (const double *)data + first;                                     \
            PORTABLE_LOOP                                                                          \
            for (ptrdiff_t i = 0; i < n; i++) {                                                    \
                REAL in = (REAL)from[i];                                                           \
                dst[i] = (expression);                                                             \
            }                                                                                      \
            break;                                                                                 \
        }                                                                                          \
        case F32: {                                                                                \
            const float *from = (const float *)data + first;                                       \
            PORTABLE_LOOP                                                                          \
            for (ptrdiff_t i = 0; i < n; i++) {                                                    \
                REAL in = from[i];                                                                 \
                dst[i] = (expression);                                                             \
            }                                                                                      \
            break;                                                                                 \
        }                                                                                          \
        case F16: {                                                                                \
            HALVES_TO_FLOATS((const uint16_t *)data + first, floats, n);                           \
            PORTABLE_LOOP                                                                          \
            for (ptrdiff_t i = 0; i < n; i++) {                                                    \
                REAL in = floats[i];                                                               \
                dst[i] = (expression);                                                             \
            }                                                                                      \
            break;                                                                                 \
        }                                                                                          \
        case BF16: {                                                                               \
            const uint16_t *from = (const uint16_t *)data + first;                                 \
            PORTABLE_LOOP                                                                          \
            for (ptrdiff_t i = 0; i < n; i++) {                                                    \
                REAL in = from_bf16(from[i]);                                                      \
                dst[i] = (expression);                                                             \
            }                                                                                      \
            break;                                                                                 \
        }                                                                                          \
        default: {                                                                                 \
            const uint8_t *from = (const uint8_t *)data + first;                                   \
            const float *values = call->f8[call->dtypes[now->k] - F8_E4M3];                        \
            for (ptrdiff_t i = 0; i < n; i++) {                                                    \
                REAL in = values[from[i]];                                                         \
                dst[i] = (expression);                                                             \
            }                                                                                      \
        }                                                                                          \
        }                                                                                          \
    } while (0)

/* Sums of an expression in `i` over the rows of the block, each in lanes of its own: the element in
 * column c of a row goes to lane c mod 16. A row may begin and end in any chunk. */
#define SUM_OF_ROWS(expression)                                                                    \
    do {                                                                                           \
        double *lanes = call->lanes + (ptrdiff_t)now->c * LANES;                                   \
        double *list = call->lists[now->dst] + first / now->k;                                     \
        int64_t column = first % now->k;                                                           \
        ptrdiff_t j = 0;                                                                           \
        while (j < n) {                                                                            \
            const int64_t left = now->k - column;                                                  \
            const ptrdiff_t end_of_row = left < n - j ? j + (ptrdiff_t)left : n;                   \
            const int is_whole = end_of_row - j == left;                                           \
            double sums[LANES];                                                                    \
            if (column)                                                                            \
                memcpy(sums, lanes, sizeof sums);                                                  \
            else                                                                                   \
                memset(sums, 0, sizeof sums);                                                      \
            for (; j < end_of_row && column % LANES; j++, column++) {                              \
                const ptrdiff_t i = j;                                                             \
                sums[column % LANES] += (expression);                                              \
            }                                                                                      \
            for (; j + LANES <= end_of_row; j += LANES, column += LANES) {                         \
                for (int lane = 0; lane < LANES; lane++) {                                         \
                    const ptrdiff_t i = j + lane;                                                  \
                    sums[lane] += (expression);                                                    \
                }                                                                                  \
            }                                                                                      \
            for (; j < end_of_row; j++, column++) {                                                \
                const ptrdiff_t i = j;                                                             \
                sums[column % LANES] += (expression);                                              \
            }                                                                                      \
            memcpy(lanes, sums, sizeof sums);                                                      \
            if (is_whole) {                                                                        \
                double sum = 0;                                                                    \
                for (int lane = 0; lane < LANES; lane++)                                           \
                    sum += sums[lane];                                                             \
                *list++ = sum;                                                                     \
                column = 0;                                                                        \
            }                                                                                      \
        }                                                                                          \
    } while (0)

/* An expression in `j` and `number`, that of the row of the block. */
#define BY_ROW_OF_BLOCK(expression)                                                                \
    do {                                                                                           \
        const double *list = call->lists[now->c] + first / now->k;                                 \
        int64_t column = first % now->k;                                                           \
        for (ptrdiff_t i = 0; i < n; list++, column = 0) {                                         \
            const int64_t left = now->k - column;                                                  \
            const ptrdiff_t end_of_row = left < n - i ? i + (ptrdiff_t)left : n;                   \
            const REAL number = (REAL)*list;                                                       \
            PORTABLE_LOOP                                                                          \
            for (ptrdiff_t j = i; j < end_of_row; j++)                                             \
                dst[j] = (expression);                                                             \
            i = end_of_row;                                                                        \
        }                                                                                          \
    } while (0)

/* to += left @ right of one row, `rank` terms of every sum: `left` is a part of a row of the left
 * factor, `right` as many rows of the right one, TILE apart. One term is added after the other, four
 * in a trip. */
TARGET static void ADD_TERMS(REAL *to, const REAL *left, const REAL *right, int32_t rank,
                             ptrdiff_t n)
{
    int32_t k = 0;
    for (; k + 4 <= rank; k += 4, right += 4 * TILE) {
        const REAL *one = right, *two = one + TILE, *three = two + TILE, *four = three + TILE;
        const REAL p = left[k], q = left[k + 1], r = left[k + 2], s = left[k + 3];
        PORTABLE_LOOP
        for (ptrdiff_t i = 0; i < n; i++)
            to[i] = to[i] + p * one[i] + q * two[i] + r * three[i] + s * four[i];
    }
    for (; k < rank; k++, right += TILE) {
        const REAL p = left[k];
        PORTABLE_LOOP
        for (ptrdiff_t i = 0; i < n; i++)
            to[i] = to[i] + p * right[i];
    }
}

/* to = elements `begin` to `end` of left @ right, row by row. A tile of the right factor at a time,
 * copied to where it stays in the first-level cache (its rows may lie such that they drive each other
 * out), for all rows that are wanted. Every sum begins at 0 and takes its terms in order. */
TARGET static void PRODUCT(REAL *to, const REAL *left, const REAL *right, int64_t width,
                           int32_t rank, int64_t begin, int64_t end)
{
    REAL packed[TERMS * TILE];
    memset(to, 0, (size_t)(end - begin) * sizeof *to);
    for (int64_t tile = 0; tile < width; tile += TILE) {
        const int64_t stop = tile + TILE < width ? tile + TILE : width;
        for (int32_t k = 0; k < rank; k += TERMS) {
            const int32_t terms = rank - k < TERMS ? rank - k : TERMS;
            for (int32_t j = 0; j < terms; j++)
                memcpy(packed + j * TILE, right + (k + j) * width + tile,
                       (size_t)(stop - tile) * sizeof *to);
            for (int64_t row = begin / width; row * width < end; row++) {
                const int64_t first = row * width + tile, last = row * width + stop;
                const int64_t from = first > begin ? first : begin;
                const int64_t until = last < end ? last : end;
                if (from < until)
                    ADD_TERMS(to + (from - begin), left + row * rank + k, packed + (from - first),
                              terms, (ptrdiff_t)(until - from));
            }
        }
    }
}

/* In how many places of a chunk two bytes of two bits have one in common. Sums of so few fit
 * bytes. */
TARGET static int32_t COUNT_COMMON(const uint8_t *one, const uint8_t *other)
{
    uint8_t sums[STRIDE] = {0};
    int32_t count = 0;
    for (ptrdiff_t i = 0; i < CHUNK; i += STRIDE)
        for (int j = 0; j < STRIDE; j++) {
            const uint8_t common = one[i + j] & other[i + j];
            sums[j] = (uint8_t)(sums[j] + ((common | common >> 1) & 1));
        }
    for (int j = 0; j < STRIDE; j++)
        count += sums[j];
    return count;
}

TARGET static void RUN(const struct call *call)
{
    REAL *registers = call->registers;
    const struct instruction *const end = call->program + call->length;
    for (const struct instruction *begin = call->program, *stop; begin <= end; begin = stop + 1) {
    for (stop = begin; stop < end && stop->operation < WAIT;)
        stop++;
    for (int64_t first = 0; first < call->count; first += CHUNK) {
        const ptrdiff_t n = call->count - first < CHUNK ? call->count - first : CHUNK;
        for (const struct instruction *now = begin; now < stop; now++) {
            REAL *dst = registers + (ptrdiff_t)now->dst * CHUNK;
            const REAL *a = registers + (ptrdiff_t)now->a * CHUNK;
            const REAL *b = registers + (ptrdiff_t)now->b * CHUNK;
            const REAL x = (REAL)now->x;
            const REAL y = (REAL)now->y;
            switch (now->operation) {
            case LOAD:
                EACH_INPUT(in);
                break;
            case LOAD_SUB:
                EACH_INPUT(in - a[i]);
                break;
            case LOAD_MUL:
                EACH_INPUT(in * x);
                break;
            case LOAD_MUL_ADD:
                EACH_INPUT(b[i] + in * x);
                break;
            case LOAD_SUB_MUL_ADD:
                EACH_INPUT(b[i] + (in - a[i]) * x);
                break;
            case COPY:
                EACH(a[i]);
                break;
            case ADD:
                EACH(a[i] + b[i]);
                break;
            case SUB:
                EACH(a[i] - b[i]);
                break;
            case MUL:
                EACH(a[i] * b[i]);
                break;
            case DIV:
                EACH(a[i] / b[i]);
                break;
            case ADD_S:
                EACH(a[i] + x);
                break;
            case MUL_S:
                EACH(a[i] * x);
                break;
            case MUL_ADD:
                EACH(b[i] + a[i] * x);
                break;
            case ABS:
                EACH(ABSOLUTE(a[i]));
                break;
            case MAX_S:
                EACH(a[i] < x ? x : a[i]);
                break;
            case GE_S:
                EACH((REAL)(a[i] >= x));
                break;
            case GT_S:
                EACH((REAL)(a[i] > x));
                break;
            case EQ_S:
                EACH((REAL)(a[i] == x));
                break;
            case KEEP: {
                /* x: dropped if equal, y: the magnitude below it */
                int64_t left = now->k - (call->start + first);
                ptrdiff_t split = left < 0 ? 0 : left > n ? n : (ptrdiff_t)left;
                PORTABLE_LOOP
                for (ptrdiff_t i = 0; i < split; i++) {
                    dst[i] = a[i] <= y && a[i] >= -y ? 0 : a[i];
                }
                PORTABLE_LOOP
                for (ptrdiff_t i = split; i < n; i++) {
                    dst[i] = a[i] <= x && a[i] >= -x ? 0 : a[i];
                }
                break;
            }
            case STORE:
                memcpy((REAL *)call->stores[now->b] + first, a, n * sizeof *a);
                break;
            case MIN_S:
                EACH(a[i] > x ? x : a[i]);
                break;
            case DROP: {
                int64_t left = now->k - (call->start + first);
                ptrdiff_t split = left < 0 ? 0 : left > n ? n : (ptrdiff_t)left;
                PORTABLE_LOOP
                for (ptrdiff_t i = 0; i < split; i++) {
                    dst[i] = a[i] > y || a[i] < -y ? 0 : a[i];
                }
                PORTABLE_LOOP
                for (ptrdiff_t i = split; i < n; i++) {
                    dst[i] = a[i] > x || a[i] < -x ? 0 : a[i];
                }
                break;
            }
            case ZERO_UP_TO_S:
                EACH(b[i] <= x ? 0 : a[i]);
                break;
            case ZERO_FROM_S:
                EACH(b[i] >= x ? 0 : a[i]);
                break;
            case ZERO_FROM: {
                const REAL *bound = registers + (ptrdiff_t)now->c * CHUNK;
                EACH(b[i] >= bound[i] ? 0 : a[i]);
                break;
            }
            case DRAW: {
                const uint64_t element = (uint64_t)(call->start + first);
                uint32_t words[4 * GROUP];
                ptrdiff_t done = 0;
                for (uint64_t counter = element / 4; done < n; counter += GROUP) {
                    draw_words((uint64_t)now->k, counter, words);
                    const ptrdiff_t skipped = (ptrdiff_t)(element + (uint64_t)done - 4 * counter);
                    const ptrdiff_t left = n - done, made = 4 * GROUP - skipped;
                    const ptrdiff_t count = left < made ? left : made;
                    for (ptrdiff_t i = 0; i < count; i++)
                        dst[done + i] = (REAL)(int32_t)(words[skipped + i] >> 8) * (REAL)0x1p-24;
                    done += count;
                }
                break;
            }
            case EXP:
                EACH((REAL)exponential(a[i]));
                break;
            case LOG:
                EACH((REAL)logarithm(a[i]));
                break;
            case SCALE_ROWS: {
                const double *table =
                    (const double *)call->tables[now->c] + (call->start + first) / now->k;
                int64_t column = (call->start + first) % now->k;
                for (ptrdiff_t i = 0; i < n; table++, column = 0) {
                    const int64_t left = now->k - column;
                    const ptrdiff_t end_of_row = left < n - i ? i + (ptrdiff_t)left : n;
                    const REAL factor = (REAL)*table;
                    PORTABLE_LOOP
                    for (ptrdiff_t j = i; j < end_of_row; j++)
                        dst[j] = a[j] * factor;
                    i = end_of_row;
                }
                break;
            }
            case SCALE_COLUMNS: {
                int64_t column = (call->start + first) % now->k;
                for (ptrdiff_t i = 0; i < n; column = 0) {
                    const double *table = (const double *)call->tables[now->c] + column;
                    const int64_t left = now->k - column;
                    const ptrdiff_t end_of_row = left < n - i ? i + (ptrdiff_t)left : n;
                    PORTABLE_LOOP
                    for (ptrdiff_t j = i; j < end_of_row; j++)
                        dst[j] = a[j] * (REAL)table[j - i];
                    i = end_of_row;
                }
                break;
            }
            case DOT_COLUMNS: {
                double *sums = call->lists[now->dst];
                int64_t column = (call->start + first) % now->k;
                if (first == 0)
                    memset(sums, 0, (size_t)now->k * sizeof *sums);
                for (ptrdiff_t i = 0; i < n; column = 0) {
                    const int64_t left = now->k - column;
                    const ptrdiff_t end_of_row = left < n - i ? i + (ptrdiff_t)left : n;
                    PORTABLE_LOOP
                    for (ptrdiff_t j = i; j < end_of_row; j++)
                        sums[column + j - i] += (double)a[j] * (double)b[j];
                    i = end_of_row;
                }
                break;
            }
            case LOAD_PRODUCT: {
                REAL *made = call->stores[now->a];
                if (first % MADE == 0) {
                    const int64_t begin = call->start + first, left = call->count - first;
                    PRODUCT(made, call->tables[now->c], call->tables[now->b], now->k, now->d, begin,
                            begin + (left < MADE ? left : MADE));
                }
                memcpy(dst, made + first % MADE, (size_t)n * sizeof *dst);
                break;
            }
            case DOT_ROWS:
                SUM_OF_ROWS((double)a[i] * (double)b[i]);
                break;
            case SUM_ROWS:
                SUM_OF_ROWS((double)a[i]);
                break;
            case MAX_ROWS: {
                double *lanes = call->lanes + (ptrdiff_t)now->c * LANES;
                double *list = call->lists[now->dst] + first / now->k;
                int64_t column = first % now->k;
                for (ptrdiff_t i = 0; i < n;) {
                    const int64_t left = now->k - column;
                    const ptrdiff_t end_of_row = left < n - i ? i + (ptrdiff_t)left : n;
                    double largest = column ? *lanes : (double)a[i];
                    for (ptrdiff_t j = i; j < end_of_row; j++)
                        largest = (double)a[j] > largest || a[j] != a[j] ? (double)a[j] : largest;
                    *lanes = largest;
                    if (end_of_row - i == left)
                        *list++ = largest;
                    i = end_of_row;
                    column = 0;
                }
                break;
            }
            case SUB_ROWS:
                BY_ROW_OF_BLOCK(a[j] - number);
                break;
            case DIV_ROWS:
                BY_ROW_OF_BLOCK(a[j] / number);
                break;
            case LOAD_STORED:
                memcpy(dst, (const REAL *)call->stores[now->b] + first, n * sizeof *dst);
                break;
            case DOT:
            case SUM: {
                double *lanes = call->lanes + now->k * LANES;
                double sums[LANES];
                memcpy(sums, lanes, sizeof sums);
                ptrdiff_t whole = n / LANES * LANES;
                if (now->operation == DOT) {
                    for (ptrdiff_t i = 0; i < whole; i += LANES)
                        for (int lane = 0; lane < LANES; lane++)
                            sums[lane] += (double)a[i + lane] * (double)b[i + lane];
                    for (ptrdiff_t i = whole; i < n; i++)
                        sums[i - whole] += (double)a[i] * (double)b[i];
                } else {
                    for (ptrdiff_t i = 0; i < whole; i += LANES)
                        for (int lane = 0; lane < LANES; lane++)
                            sums[lane] += (double)a[i + lane];
                    for (ptrdiff_t i = whole; i < n; i++)
                        sums[i - whole] += (double)a[i];
                }
                memcpy(lanes, sums, sizeof sums);
                break;
            }
            case LARGEST: {
                REAL sizes[CHUNK];
                double *lanes = call->lanes + now->k * LANES;
                PORTABLE_LOOP
                for (ptrdiff_t i = 0; i < n; i++) {
                    const REAL size = ABSOLUTE(a[i]);
                    sizes[i] = size >= 0 ? size : 0; /* nan does not count */
                }
                memset(sizes + n, 0, (size_t)(CHUNK - n) * sizeof *sizes);
                for (ptrdiff_t half = CHUNK / 2; half; half /= 2) {
                    PORTABLE_LOOP
                    for (ptrdiff_t i = 0; i < half; i++)
                        sizes[i] = sizes[i] > sizes[i + half] ? sizes[i] : sizes[i + half];
                }
                lanes[0] = sizes[0] > lanes[0] ? sizes[0] : lanes[0];
                break;
            }
            case SIGNS: {
                uint8_t signs[MOST_SIGNS][CHUNK]; /* 1: above 0, 2: below */
                double *lanes = call->lanes + now->k * LANES;
                for (int32_t r = 0; r < now->b; r++, a += CHUNK) {
                    int32_t wide[CHUNK];
                    PORTABLE_LOOP
                    for (ptrdiff_t i = 0; i < n; i++)
                        wide[i] = (a[i] > 0 ? 1 : 0) + (a[i] < 0 ? 2 : 0);
                    PORTABLE_LOOP
                    for (ptrdiff_t i = 0; i < n; i++)
                        signs[r][i] = (uint8_t)wide[i];
                    memset(signs[r] + n, 0, (size_t)(CHUNK - n));
                }
                for (int32_t r = 0; r < now->b; r++)
                    for (int32_t q = 0; q <= r; q++, lanes += LANES)
                        *lanes += COUNT_COMMON(signs[r], signs[q]);
                uint8_t both[CHUNK];
                for (int32_t r = 1; r < now->c; r++)
                    for (ptrdiff_t i = 0; i < CHUNK; i++)
                        signs[0][i] |= signs[r][i];
                for (ptrdiff_t i = 0; i < CHUNK; i++)
                    both[i] = signs[0][i] == 3;
                lanes[0] += COUNT_COMMON(signs[0], signs[0]);
                lanes[LANES] += COUNT_COMMON(both, both);
                break;
            }
            case COUNT: {
                int64_t *counters = call->counters + now->k * 3;
                int32_t above = 0, reaching = 0;
                for (ptrdiff_t i = 0; i < n; i++) {
                    above += a[i] > y;
                    reaching += a[i] >= x;
                }
                counters[0] += above;
                if (reaching > above && x != y) { /* if x is y, all of them are equal to it */
                    REAL *store = (REAL *)call->stores[now->b] + counters[1];
                    uint8_t inside[CHUNK];
                    memset(inside + n, 0, CHUNK - n);
                    for (ptrdiff_t i = 0; i < n; i++)
                        inside[i] = a[i] >= x && !(a[i] > y);
                    for (ptrdiff_t group = 0; group < n; group += 8) {
                        uint64_t any;
                        memcpy(&any, inside + group, sizeof any);
                        for (ptrdiff_t i = group; any && i < group + 8; i++) {
                            if (inside[i])
                                *store++ = a[i];
                        }
                    }
                }
                counters[1] += reaching - above;
                break;
            }
            case FIND: {
                int64_t *counters = call->counters + now->k * 3;
                for (ptrdiff_t i = 0; i < n; i++) {
                    counters[0] += a[i] == x;
                    if (a[i] == x && counters[0] == now->b)
                        counters[1] = call->start + first + i;
                }
                break;
            }
            }
        }
        if (call->output && stop == end) {
            const REAL *from = registers + (ptrdiff_t)call->result * CHUNK;
            switch (call->output_dtype) {
            case F64: {
                double *to = (double *)call->output + first;
                PORTABLE_LOOP
                for (ptrdiff_t i = 0; i < n; i++)
                    to[i] = from[i];
                break;
            }
            case F32: {
                float *to = (float *)call->output + first;
                PORTABLE_LOOP
                for (ptrdiff_t i = 0; i < n; i++)
                    to[i] = (float)from[i];
                break;
            }
            case F16: {
                uint16_t *to = (uint16_t *)call->output + first;
                float floats[CHUNK];
                PORTABLE_LOOP
                for (ptrdiff_t i = 0; i < n; i++)
                    floats[i] = call->rounds_once ? TO_ODD(from[i]) : (float)from[i];
                FLOATS_TO_HALVES(floats, to, n);
                break;
            }
            case BF16: {
                uint16_t *to = (uint16_t *)call->output + first;
                float floats[CHUNK];
                PORTABLE_LOOP
                for (ptrdiff_t i = 0; i < n; i++)
                    floats[i] = call->rounds_once ? TO_ODD(from[i]) : (float)from[i];
                PORTABLE_LOOP
                for (ptrdiff_t i = 0; i < n; i++)
                    to[i] = to_bf16(floats[i]);
                break;
            }
            }
        }
    }
    if (stop < end && stop->operation == RANK_ROWS)
        rank_rows(call, stop);
    }
}

#undef EACH
#undef SUM_OF_ROWS
#undef BY_ROW_OF_BLOCK
#undef EACH_INPUT
#undef REAL
#undef ABSOLUTE
#undef RUN
#undef PRODUCT
#undef ADD_TERMS
#undef COUNT_COMMON
#undef TO_ODD

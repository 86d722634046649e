/* Ranking of one row for one working type (kernels.c). */

static void RANK_ROW(REAL *row, int64_t length, void *spare)
{
    BITS *keys = spare, *other_keys = keys + length;
    uint32_t *places = (uint32_t *)(other_keys + length), *other_places = places + length;
    const BITS sign = (BITS)1 << (8 * sizeof(BITS) - 1);

    for (int64_t i = 0; i < length; i++) {
        BITS bits;
        memcpy(&bits, row + i, sizeof bits);
        keys[i] = row[i] == row[i] ? bits & ~sign : ~sign;
    }
    if (length <= FEW) {
        for (int64_t i = 0; i < length; i++) {
            const BITS key = keys[i];
            int64_t j = i;
            for (; j > 0 && other_keys[j - 1] > key; j--) {
                other_keys[j] = other_keys[j - 1];
                places[j] = places[j - 1];
            }
            other_keys[j] = key;
            places[j] = (uint32_t)i;
        }
        for (int64_t rank = 0; rank < length; rank++)
            row[places[rank]] = (REAL)rank;
        return;
    }

    int64_t ends[DIGITS][BUCKETS];
    memset(ends, 0, sizeof ends);
    for (int64_t i = 0; i < length; i++) {
        for (int digit = 0; digit < DIGITS; digit++)
            ends[digit][(keys[i] >> (DIGIT * digit)) & (BUCKETS - 1)]++;
        places[i] = (uint32_t)i;
    }
    for (int digit = 0; digit < DIGITS; digit++) {
        int64_t *starts = ends[digit];
        int64_t before = 0;
        int is_one = 0;
        for (int bucket = 0; bucket < BUCKETS; bucket++) {
            const int64_t count = starts[bucket];
            is_one |= count == length;
            starts[bucket] = before;
            before += count;
        }
        if (is_one)
            continue; /* all keys have the same digit */
        for (int64_t i = 0; i < length; i++) {
            const BITS key = keys[i];
            const int64_t place = starts[(key >> (DIGIT * digit)) & (BUCKETS - 1)]++;
            other_keys[place] = key;
            other_places[place] = places[i];
        }
        BITS *swapped_keys = keys;
        keys = other_keys;
        other_keys = swapped_keys;
        uint32_t *swapped_places = places;
        places = other_places;
        other_places = swapped_places;
    }
    for (int64_t rank = 0; rank < length; rank++)
        row[places[rank]] = (REAL)rank;
}

#undef REAL
#undef BITS
#undef RANK_ROW
#undef DIGITS

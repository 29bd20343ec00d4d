/* x @ W.T for a small batch in bfloat16. */
#pragma once
#define ISA_BFLOAT16
#include "avx512.h"
#include "few.h"

/* Split 64 columns, those of a group's low or of its high nibbles: columns of even bytes to out, of odd bytes to out + step. */
INLINE void put_nibbles(W front, W back, uint16_t *out, int64_t step)
{
    const W lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const W even = _mm512_add_epi32(_mm512_set1_epi32(0x00020000), _mm512_mullo_epi32(lane, _mm512_set1_epi32(0x00040004)));
    const W odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
    _mm512_storeu_si512(out, _mm512_permutex2var_epi16(front, even, back));
    _mm512_storeu_si512(out + step, _mm512_permutex2var_epi16(front, odd, back));
}

/* Pack batch row m in the order in which codes are decoded from 16-bit words: per group, nibbles 0 to 3 of every
 * 16-bit word, where word 2 * i + h is half h of 32-bit word i; per nibble, 32 columns of each batch row. */
static void pack_bf16(const struct job *job, int64_t m)
{
    const struct weight *w = job->weight;
    const int64_t half = w->half, step = (job->m1 - job->m0) * 32; /* numbers from a nibble to the next */
    const uint16_t *x = (const uint16_t *)job->x + m * w->columns;
    uint16_t *out = (uint16_t *)job->packed + (m - job->m0) * 32;
    /* For small blocks, indices of 64-bit words of two vectors: those of first halves of blocks, and those of second halves. */
    uint64_t fours[2][8];
    for (int64_t n = 0, run = smaller(half / 4, 4); n < 8; n++) {
        fours[0][n] = (uint64_t)(n / run * 2 * run + n % run);
        fours[1][n] = fours[0][n] + (uint64_t)run;
    }
    for (int64_t g = job->g0; g < job->g1; g++, out += 4 * step) {
        const int64_t byte = g * LANES * 4, block = byte / half;
        const int whole_blocks = LANES * 4 % half == 0 && 2 * byte + GROUP <= w->columns; /* the group consists of whole blocks */
        if (whole_blocks && half <= 16) {
            W v[4];
            for (int i = 0; i < 4; i++)
                v[i] = _mm512_loadu_si512(x + 2 * byte + 32 * i);
            for (int high = 0; high < 2; high++) {
                const W from = _mm512_loadu_si512(fours[high]);
                put_nibbles(_mm512_permutex2var_epi64(v[0], from, v[1]), _mm512_permutex2var_epi64(v[2], from, v[3]),
                                   out + high * step, 2 * step);
            }
        } else if (whole_blocks || (half % (LANES * 4) == 0 && 2 * half * (block + 1) <= w->columns)) {
            const uint16_t *lows = x + byte + block * half, *backs = lows + (half == 32 ? 64 : 32);
            for (int high = 0; high < 2; high++, lows += half, backs += half)
                put_nibbles(_mm512_loadu_si512(lows), _mm512_loadu_si512(backs), out + high * step, 2 * step);
        } else {
            for (int k = 0; k < 4; k++)
                memset(out + k * step, 0, 64);
            for (int64_t i = 0, low, high; i < LANES * 4 && byte + i < w->row_bytes; i++) {
                uint16_t *to = out + i % 2 * 2 * step + i / 2;
                columns_of(byte + i, w->columns, half, &low, &high);
                to[0] = x[low];
                if (high >= 0)
                    to[step] = x[high];
            }
        }
    }
}

/* Rows that are multiplied at a time with M batch rows; two batch rows (EACH_OF_TWO) are multiplied at a time. */
#define BF16_ROWS(M) ((M) <= 2 ? 4 : 2)
#define EACH_OF_TWO EACH_INPUT if (j / 2 == two)

/* As `few`, in bfloat16: one permute looks up 32 levels, which stay in registers for all batch rows. */
INLINE void few_bf16(const struct job *job, int64_t r, const int R, const int M, V *out)
{
    const struct weight *w = job->weight;
    const float *x = job->packed;
    const T table = table_bf16(w->levels);
    struct reading at;
    V acc[FEW_SUMS];
    begin_reading(&at, w, r, job->g0, R);
    EACH_ROW EACH_INPUT acc[AT] = v_zero();
    for (int64_t g = job->g0; g < job->g1; g++, x += M * (GROUP / 2)) {
        V level[4 * 4];
        read_group(&at, w, r, g, R);
#pragma GCC unroll 4
        for (int two = 0; 2 * two < M; two++) {
            V sum[FEW_SUMS];
            EACH_ROW EACH_OF_TWO sum[AT] = v_zero();
#pragma GCC unroll 4
            for (int k = 0; k < 4; k++) {
                if (!two)
                    EACH_ROW level[i * 4 + k] = pair_levels(table, at.words[i], k);
                EACH_OF_TWO {
                    const V value = v_load(x + (k * M + j) * LANES);
                    EACH_ROW sum[AT] = multiply_pairs(level[i * 4 + k], value, sum[AT]);
                }
            }
            EACH_ROW EACH_OF_TWO acc[AT] = v_fma(sum[AT], at.scale[i], acc[AT]);
        }
    }
    EACH_ROW EACH_INPUT out[j * LANES + i] = acc[AT];
}

ROWS_WITH_MORE(rows_bf16, BF16_ROWS, few_bf16)

static void pack_few_bf16(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    for (int64_t m = job->m0; m < job->m1; m++)
        pack_bf16(job, m);
    sum_blocks(job);
}

static void few_bf16_body(struct job *job, int64_t part, int64_t parts, int64_t thread) { few_rows(job, part, parts, rows_bf16); }

/* The codes and scales of rows, bit for bit those of lowmem/blockwise.py. Plain loops: the compiler makes vectors. */

INLINE uint32_t LEVEL(largest)(const float *x, int64_t n)
{
    uint32_t most = 0; /* magnitudes are ordered as their bits are, and a NaN lies above infinity */
    for (int64_t i = 0; i < n; i++) {
        const uint32_t bits = bits_of(x[i]) & 0x7fffffff;
        most = bits > most ? bits : most;
    }
    return most;
}

/* The stored scale of every block of a row, and what divides its weights, from the magnitudes in `divisors`. */
static void LEVEL(encode)(const struct weight *w, int64_t row, float *divisors, uint8_t *scales)
{
    const int64_t n = w->blocks;
    if (w->encoding == SCALES_FLOAT32) {
        float *out = (float *)scales + row * n;
        for (int64_t b = 0; b < n; b++)
            divisors[b] = out[b] = divisors[b] < 0x1p-126f ? 0.0f : divisors[b];
    } else if (w->encoding == SCALES_FLOAT16) {
        uint16_t *out = (uint16_t *)scales + row * n;
        for (int64_t b = 0; b < n; b++) {
            out[b] = float_to_half_below(divisors[b]);
            divisors[b] = half_to_float(out[b]);
        }
    } else {
        uint8_t *out = scales + row * (n + 2);
        float most = 0.0f;
        for (int64_t b = 0; b < n; b++)
            most = divisors[b] > most ? divisors[b] : most;
        const uint16_t bits = float_to_half_below(most);
        const float row_scale = half_to_float(bits), divisor = row_scale > 0x1p-24f ? row_scale : 0x1p-24f;
        memcpy(out + n, &bits, 2);
        for (int64_t b = 0; b < n; b++) {
            const float raised = divisors[b] * (float)(255 * (1 + 0x1p-20)) / divisor;
            int steps = raised >= 255.0f ? 255 : raised < 1.0f ? 1 : (int)raised;
            if (divisors[b] == 0.0f || row_scale == 0.0f)
                steps = 0;
            out[b] = (uint8_t)steps;
            divisors[b] = (float)steps * row_scale / 255.0f;
        }
    }
    for (int64_t b = 0; b < n; b++)
        if (divisors[b] == 0.0f)
            divisors[b] = float_of(0x7f800000); /* a block without a scale gets the zero code */
}

/* Rows of float32 to packed codes and scales; `codes` is scratch for a row and a block's divisors. Returns whether all
 * weights are finite and no magnitude is above `most`; if not, nothing that was written counts. */
static int LEVEL(quantize)(const float *x, int64_t rows, const struct weight *w, const float *boundaries, int zero,
                           float most, uint8_t *packed, uint8_t *scales, uint8_t *codes)
{
    const int64_t size = 2 * w->half;
    float *divisors = (float *)codes;
    uint8_t *row_codes = codes + round_up(w->blocks, MAX_LANES) * (int64_t)sizeof(float);
    for (int64_t r = 0; r < rows; r++, x += w->columns, packed += w->row_bytes) {
        uint32_t largest = 0;
        for (int64_t b = 0; b < w->blocks; b++) {
            const uint32_t bits = LEVEL(largest)(x + b * size, smaller(size, w->columns - b * size));
            largest = bits > largest ? bits : largest;
            divisors[b] = float_of(bits);
        }
        if (largest > bits_of(most))
            return 0;
        LEVEL(encode)(w, r, divisors, scales);
        for (int64_t b = 0; b < w->blocks; b++) {
            const int64_t n = smaller(size, w->columns - b * size), half = (n + 1) / 2;
            const float *from = x + b * size;
            const float divisor = divisors[b];
            for (int64_t i = 0; i < n; i += 16) {
                uint32_t code[16] = {0};
                float relative[16] = {0};
                const int64_t m = smaller(16, n - i);
                if (m == 16)
                    for (int j = 0; j < 16; j++)
                        relative[j] = from[i + j] / divisor;
                else
                    for (int64_t j = 0; j < m; j++)
                        relative[j] = from[i + j] / divisor;
                for (int k = 0; k < 15; k++)
                    for (int j = 0; j < 16; j++)
                        code[j] += relative[j] > boundaries[k];
                for (int64_t j = 0; j < m; j++)
                    row_codes[i + j] = (uint8_t)code[j];
            }
            if (n % 2)
                row_codes[n] = (uint8_t)zero;
            for (int64_t j = 0; j < half; j++)
                packed[b * w->half + j] = (uint8_t)(row_codes[j] | row_codes[half + j] << 4);
        }
    }
    return 1;
}

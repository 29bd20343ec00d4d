/* Vectors of 16 bytes (rows.h) for the x86-64 ISAs from avx2 on. */
#pragma once
#include <immintrin.h>

#define OWN_BYTES
typedef __m128i bytes;
#define bytes_lookup _mm_shuffle_epi8
#define bytes_zip_low _mm_unpacklo_epi8
#define bytes_zip_high _mm_unpackhi_epi8
#define bytes_low(a, b) _mm_packus_epi16(_mm_and_si128(a, _mm_set1_epi16(255)), _mm_and_si128(b, _mm_set1_epi16(255)))
#define bytes_high(a, b) _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8))
static inline bytes low_nibbles(bytes a) { return _mm_and_si128(a, _mm_set1_epi8(15)); }
static inline bytes high_nibbles(bytes a) { return low_nibbles(_mm_srli_epi16(a, 4)); }

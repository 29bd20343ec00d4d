/* Makes struct order of kernel.h: the order in which the columns of a row are decoded from its words. A group is
 * `lanes` words of 32 bits; vector k of a group holds nibble k of each of them. The low nibble of a byte is a column
 * of the block's first half, the high nibble the column half a block later. A row's last block may be short: its
 * halves are shorter, too. */
#pragma once
#include <stdlib.h>

#include "kernel.h"

/* The place (vector * lanes + lane) of the low or high nibble of a byte of a row. */
static int32_t place_of(int64_t byte, int high, int64_t lanes)
{
    const int64_t word = byte / 4, nibble = 2 * (byte % 4) + high;
    return (int32_t)(word / lanes * lanes * 8 + nibble * lanes + word % lanes);
}

/* The order for rows of `columns` columns in blocks of `size`, or NULL without memory. The caller frees it. */
static struct order *make_order(int64_t lanes, int64_t columns, int64_t size)
{
    const int64_t stride = round_up(columns + columns % 2, MAX_GROUP), groups = stride / (lanes * 8), half = size / 2;
    const int64_t row_bytes = (columns + 1) / 2;
    struct order *order = malloc(sizeof *order + (size_t)(columns + stride / 8 + groups) * sizeof(int32_t));
    if (!order)
        return NULL;
    int32_t *place = order->tables, *block = place + columns, *first_block = block + stride / 8;
    for (int64_t byte = 0, low, high; byte < row_bytes; byte++) {
        columns_of(byte, columns, half, &low, &high);
        place[low] = place_of(byte, 0, lanes);
        if (high >= 0)
            place[high] = place_of(byte, 1, lanes);
    }
    for (int64_t g = 0; g < groups; g++) {
        const int64_t byte = smaller(g * lanes * 4, row_bytes - 1), last = smaller((g + 1) * lanes * 4, row_bytes) - 1;
        first_block[g] = (int32_t)(byte / half);
        /* One vector holds the scales of several groups, so that a kernel reads them once. */
        if (g && last / half - first_block[g - 1] < lanes)
            first_block[g] = first_block[g - 1];
        for (int64_t word = g * lanes; word < (g + 1) * lanes; word++)
            block[word] = word * 4 < row_bytes ? (int32_t)(word * 4 / half) - first_block[g] : 0;
    }
    order->lanes = lanes;
    order->groups = groups;
    order->place = place;
    order->block = block;
    order->first_block = first_block;
    return order;
}

/* Runs jobs on the threads of the OpenMP library that torch has loaded (share_threads of module.c). A call is one
 * parallel region; within it, a thread that finishes a part takes the next one. */
#ifndef LOWMEM_THREADS_H
#define LOWMEM_THREADS_H

#if defined(_WIN32)
#define sched_yield() ((void)0)
#else
#include <sched.h>
#endif

#include "kernel.h"

#define GRAIN 65536 /* multiplications per additional thread */

int64_t visited_columns;

static void (*run_parallel)(void (*)(void *), void *, unsigned, unsigned);
static int (*thread_number)(void);

struct region {
    struct job *job;
    int many; /* whether the region runs on several threads */
    body first, then;
    int64_t firsts, parts; /* number of parts of `first`, and of `first` and `then` */
    int64_t next, done;    /* next part to take; finished parts of `first` */
};

#if defined(__x86_64__)
#define pause() __builtin_ia32_pause()
#else
#define pause() ((void)0)
#endif
#define PATIENCE 4096 /* pauses after which a waiting thread yields its core */

/* What each thread of the region runs. */
static void region_body(void *data)
{
    struct region *region = data;
    const int64_t thread = region->many ? thread_number() : 0, firsts = region->firsts;
    struct job copy, *job = region->job;
    /* The thread packs a copy for itself: it neither waits for other threads nor reads what they packed from their caches. */
    if (job->packed_step) {
        copy = *job;
        job = &copy;
        job->packed += thread * job->packed_step;
        region->first(job, 0, firsts, thread);
    }
    for (int64_t part; (part = __atomic_fetch_add(&region->next, 1, __ATOMIC_RELAXED)) < region->parts;) {
        if (part < firsts) {
            region->first(job, part, firsts, thread);
            __atomic_fetch_add(&region->done, 1, __ATOMIC_RELEASE);
            continue;
        }
        for (int64_t waited = 0; __atomic_load_n(&region->done, __ATOMIC_ACQUIRE) < firsts; waited++)
            if (waited < PATIENCE)
                pause();
            else
                sched_yield();
        region->then(job, part - firsts, region->parts - firsts, thread);
    }
}

/* Run `first`, then `then` (or NULL), in parts: first_parts and then_parts are parts per thread, and 0 means one part in all.
 * A thread that finishes a part takes the next one; no part of `then` begins before all of `first` are done. Where threads
 * pack their own copies of x (packed_step), each of them runs part 0 of `first` for itself, and first_parts are counted beyond
 * that one. */
static void parallel(struct job *job, body first, int64_t first_parts, body then, int64_t then_parts)
{
    const int many = job->threads > 1 && run_parallel;
    const int64_t begun = job->packed_step > 0, firsts = many && first_parts ? first_parts * job->threads + begun : 1;
    const int64_t thens = !then ? 0 : many ? then_parts * job->threads : 1;
    struct region region = {job, many, first, then, firsts, firsts + thens, begun, begun};
    if (many)
        run_parallel(region_body, &region, (unsigned)job->threads, 0);
    else
        region_body(&region);
}

/* Call run for each piece of the batch and, within it, each run of at most `wide` groups of columns; stop when the job is
 * refused. */
static void in_pieces(struct job *job, int64_t groups, int64_t wide, void (*run)(struct job *))
{
    for (job->m0 = 0; job->m0 < job->batch && !is_refused(job); job->m0 = job->m1) {
        job->m1 = smaller(job->m0 + job->piece, job->batch);
        for (job->g0 = 0; job->g0 < groups && !is_refused(job); job->g0 = job->g1) {
            job->g1 = smaller(job->g0 + wide, groups);
            run(job);
        }
    }
}

/* The number of threads for `work` multiplications, at most `most`. */
static int64_t threads_for(long long most, double work)
{
    const double worth = 1.0 + work / GRAIN;
    return worth < (double)most ? (int64_t)worth : (int64_t)most;
}

#endif

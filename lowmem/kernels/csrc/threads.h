/* Runs jobs on the threads of the OpenMP library that torch has loaded (share_threads of module.c). A call is one parallel
 * region, of which a thread that finishes a part takes the next one. Beside other processes a thread may wait milliseconds for a
 * core, for work of microseconds. So when recent regions took longer than their parts do one after another, the next ones get
 * half of the threads, in the end the caller alone, for a while: twice as long as the last time if all threads fail again soon. */
#pragma once
#include <sched.h>
#include <time.h>

#include "kernel.h"

#define GRAIN 65536 /* multiplications per additional thread */

int64_t visited_columns;

static void (*run_parallel)(void (*)(void *), void *, unsigned, unsigned);
static int (*thread_number)(void);

static int64_t cpus = 1; /* most threads of a region: the CPUs that the process may use (limit_threads of module.c) */

/* In nanoseconds */
#define CREDIT 200000      /* most gain that is held against a loss, so that a rare interruption changes nothing */
#define MOST_LOSS 10000000 /* most loss of a region: a process that was stopped learns nothing from it */
#define MOST_PAUSE 250000000 /* longest time for which fewer threads are used */

/* What was learned about other processes. Callers in several threads read and write it; an update that is lost only delays. */
static struct {
    int64_t threads, until; /* most threads of the regions that begin before the time `until` */
    int64_t pause;          /* for how long fewer threads were used last */
    int64_t balance;        /* loss of recent regions; a gain is negative */
    int ignored;            /* all threads are used all the same, for tests */
} crowd;

enum { PACKING, FIRST, THEN, PHASES };

struct region {
    struct job *job;
    int many; /* whether the region runs on several threads */
    body first, then;
    int64_t firsts, parts; /* number of parts of `first`, and of `first` and `then` */
    int64_t next, done;    /* next part to take; finished parts of `first` */
    int64_t sum[PHASES], longest[PHASES]; /* nanoseconds of all parts, and of the longest */
};

#if defined(__x86_64__)
#define relax() __builtin_ia32_pause()
#else
#define relax() ((void)0)
#endif
#define PATIENCE 4096 /* turns after which a waiting thread yields its core */

#define get(variable) __atomic_load_n(&(variable), __ATOMIC_RELAXED)
#define set(variable, value) __atomic_store_n(&(variable), value, __ATOMIC_RELAXED)

/* Nanoseconds of a clock that never goes back. */
static int64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Note how long a part took that began at `*time`, which becomes the time now. */
static void note(struct region *region, int phase, int64_t *time)
{
    if (!region->many)
        return;
    const int64_t began = *time, took = (*time = now()) - began;
    __atomic_fetch_add(&region->sum[phase], took, __ATOMIC_RELAXED);
    if (took > get(region->longest[phase]))
        set(region->longest[phase], took);
}

/* Estimate the nanoseconds that parts take in turn, from measured ones but the longest, which may have lost its core. */
static int64_t one_after_another(const struct region *region, int phase, int64_t parts, int64_t measured)
{
    if (measured < 2)
        return region->sum[phase];
    return (region->sum[phase] - region->longest[phase]) * parts / (measured - 1);
}

/* What each thread of the region runs. */
static void region_body(void *data)
{
    struct region *region = data;
    const int64_t thread = region->many ? thread_number() : 0, firsts = region->firsts;
    int64_t time = region->many ? now() : 0;
    struct job copy, *job = region->job;
    /* The thread packs a copy for itself: it neither waits for other threads nor reads what they packed from their caches. */
    if (job->packed_step) {
        copy = *job;
        job = &copy;
        job->packed += thread * job->packed_step;
        region->first(job, 0, firsts, thread);
        note(region, PACKING, &time);
    }
    for (int64_t part; (part = __atomic_fetch_add(&region->next, 1, __ATOMIC_RELAXED)) < region->parts;) {
        if (part < firsts) {
            region->first(job, part, firsts, thread);
            __atomic_fetch_add(&region->done, 1, __ATOMIC_RELEASE);
            note(region, FIRST, &time);
            continue;
        }
        if (__atomic_load_n(&region->done, __ATOMIC_ACQUIRE) < firsts) {
            for (int64_t waited = 0; __atomic_load_n(&region->done, __ATOMIC_ACQUIRE) < firsts; waited++)
                if (waited < PATIENCE)
                    relax();
                else
                    sched_yield();
            time = now();
        }
        region->then(job, part - firsts, region->parts - firsts, thread);
        note(region, THEN, &time);
    }
}

/* The number of threads for a region of at most `most` that begins at `time`. */
static int64_t threads_at(int64_t time, int64_t most)
{
    return time < get(crowd.until) && !crowd.ignored ? smaller(most, get(crowd.threads)) : most;
}

/* Learn from a region that took `took` nanoseconds until `end`, and whose parts take `alone` in turn. A quarter more is no
 * loss: one thread would not always have a core, either. */
static void learn(int64_t threads, int64_t took, int64_t alone, int64_t end)
{
    const int64_t balance = get(crowd.balance) + smaller(took - alone - alone / 4, MOST_LOSS);
    set(crowd.balance, balance > 0 ? 0 : balance < -CREDIT ? -CREDIT : balance);
    if (balance <= 0)
        return;
    const int64_t last = get(crowd.pause), again = end - get(crowd.until) < last;
    const int64_t pause = smaller(again && last > balance ? 2 * last : 2 * balance, MOST_PAUSE);
    set(crowd.pause, pause);
    set(crowd.threads, threads / 2);
    set(crowd.until, end + pause);
}

/* Run `first`, then `then` (or NULL), in parts: first_parts and then_parts are parts per thread, and 0 means one part in all.
 * No part of `then` begins before all of `first` are done. Where threads pack their own copies of x (packed_step), each runs
 * part 0 of `first` for itself, and first_parts are counted beyond that one. */
static void parallel(struct job *job, body first, int64_t first_parts, body then, int64_t then_parts)
{
    const int64_t most = run_parallel ? smaller(job->threads, cpus) : 1, began = most > 1 ? now() : 0;
    const int64_t threads = threads_at(began, most);
    const int many = threads > 1;
    const int64_t begun = job->packed_step > 0, firsts = many && first_parts ? first_parts * threads + begun : 1;
    const int64_t thens = !then ? 0 : many ? then_parts * threads : 1;
    struct region region = {job, many, first, then, firsts, firsts + thens, begun, begun, {0}, {0}};
    if (!many) {
        region_body(&region);
        return;
    }
    run_parallel(region_body, &region, (unsigned)threads, 0);
    const int64_t end = now(), alone = one_after_another(&region, PACKING, 1, begun * threads) +
                                        one_after_another(&region, FIRST, firsts - begun, firsts - begun) +
                                        one_after_another(&region, THEN, thens, thens);
    learn(threads, end - began, alone, end);
}

/* Call run for each piece of the batch and, within it, for at most `wide` groups of columns, until the job is refused. */
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

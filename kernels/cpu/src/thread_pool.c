#define _GNU_SOURCE
#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <time.h>

enum {
    MOST = 255,            /* helpers */
    SPIN_NS = 120 * 1000,  /* how long a helper waits awake: the gap between two products of a decode step */
    LOOKS = 32,            /* pauses between two looks at the clock */
    PATIENCE = 4096        /* pauses before the caller lets others run */
};

static struct {
    pthread_mutex_t caller; /* who holds it has the crew */
    atomic_long next, joined, working;
    atomic_bool open;
    atomic_ulong jobs; /* rises with every job: helpers wait for it */
    atomic_long asleep;
    pthread_mutex_t bed;
    pthread_cond_t alarm;
    long helpers, seats, chunks;
    void (*body)(void *, long);
    void *job;
} crew = {.caller = PTHREAD_MUTEX_INITIALIZER, .bed = PTHREAD_MUTEX_INITIALIZER, .alarm = PTHREAD_COND_INITIALIZER};

static inline void rest(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static long now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000L + t.tv_nsec;
}

static void work(void)
{
    for (long chunk; (chunk = atomic_fetch_add(&crew.next, 1)) < crew.chunks;)
        crew.body(crew.job, chunk);
}

/* Returns the number of a job newer than `seen`. */
static unsigned long await_job(unsigned long seen)
{
    long until = now_ns() + SPIN_NS;
    do
        for (int look = 0; look < LOOKS; look++) {
            if (atomic_load(&crew.jobs) != seen)
                return atomic_load(&crew.jobs);
            rest();
        }
    while (now_ns() < until);
    pthread_mutex_lock(&crew.bed);
    atomic_fetch_add(&crew.asleep, 1);
    while (atomic_load(&crew.jobs) == seen)
        pthread_cond_wait(&crew.alarm, &crew.bed);
    atomic_fetch_sub(&crew.asleep, 1);
    pthread_mutex_unlock(&crew.bed);
    return atomic_load(&crew.jobs);
}

static void *help(void *unused)
{
    (void)unused;
    for (unsigned long seen = 0;;) {
        seen = await_job(seen);
        /* Announced first, checked then: a caller that closes the job waits for whoever may have got in. */
        atomic_fetch_add(&crew.working, 1);
        if (atomic_load(&crew.open) && atomic_fetch_add(&crew.joined, 1) < crew.seats)
            work();
        atomic_fetch_sub(&crew.working, 1);
    }
    return 0;
}

static void hire(long wanted)
{
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    for (pthread_t thread; crew.helpers < wanted && crew.helpers < MOST; crew.helpers++)
        if (pthread_create(&thread, &attributes, help, 0))
            break;
    pthread_attr_destroy(&attributes);
}

void crew_run(long threads, long chunks, void (*body)(void *job, long chunk), void *job)
{
    if (threads <= 1 || chunks <= 1 || pthread_mutex_trylock(&crew.caller)) {
        for (long chunk = 0; chunk < chunks; chunk++)
            body(job, chunk);
        return;
    }
    hire(threads - 1);
    crew.body = body;
    crew.job = job;
    crew.chunks = chunks;
    crew.seats = threads - 1;
    atomic_store(&crew.joined, 0);
    atomic_store(&crew.next, 0);
    atomic_store(&crew.open, true);
    atomic_fetch_add(&crew.jobs, 1);
    if (atomic_load(&crew.asleep)) {
        pthread_mutex_lock(&crew.bed);
        pthread_cond_broadcast(&crew.alarm);
        pthread_mutex_unlock(&crew.bed);
    }
    work();
    atomic_store(&crew.open, false);
    for (long waited = 0; atomic_load(&crew.working); waited++)
        if (waited < PATIENCE)
            rest();
        else
            sched_yield();
    pthread_mutex_unlock(&crew.caller);
}

#define _GNU_SOURCE
#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <time.h>

enum {
    MOST = 255,            /* workers */
    SPIN_NS = 120 * 1000,  /* how long a worker waits awake: the gap between two products of a decode step */
    LOOKS = 32,            /* pauses between two looks at the clock */
    PATIENCE = 4096        /* pauses before the caller lets others run */
};

static struct {
    pthread_mutex_t caller; /* who holds it has the pool */
    atomic_long next, joined, working;
    atomic_bool open;
    atomic_ulong jobs; /* rises with every job: workers wait for it */
    atomic_long asleep;
    pthread_mutex_t sleep_lock;
    pthread_cond_t wake;
    long workers, places, chunks;
    void (*body)(void *, long);
    void *job;
} pool = {
    .caller = PTHREAD_MUTEX_INITIALIZER, .sleep_lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

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
    for (long chunk; (chunk = atomic_fetch_add(&pool.next, 1)) < pool.chunks;)
        pool.body(pool.job, chunk);
}

/* Returns the number of a job newer than `seen`. */
static unsigned long await_job(unsigned long seen)
{
    long until = now_ns() + SPIN_NS;
    do {
        for (int look = 0; look < LOOKS; look++) {
            if (atomic_load(&pool.jobs) != seen)
                return atomic_load(&pool.jobs);
            rest();
        }
        sched_yield(); /* who else wants this core goes first: where few cores are, the loop with the step's answer */
    } while (now_ns() < until);
    pthread_mutex_lock(&pool.sleep_lock);
    atomic_fetch_add(&pool.asleep, 1);
    while (atomic_load(&pool.jobs) == seen)
        pthread_cond_wait(&pool.wake, &pool.sleep_lock);
    atomic_fetch_sub(&pool.asleep, 1);
    pthread_mutex_unlock(&pool.sleep_lock);
    return atomic_load(&pool.jobs);
}

static void *worker_main(void *unused)
{
    (void)unused;
    for (unsigned long seen = 0;;) {
        seen = await_job(seen);
        /* Announced first, checked then: a caller that closes the job waits for whoever may have got in. */
        atomic_fetch_add(&pool.working, 1);
        if (atomic_load(&pool.open) && atomic_fetch_add(&pool.joined, 1) < pool.places)
            work();
        atomic_fetch_sub(&pool.working, 1);
    }
    return 0;
}

static void start_workers(long wanted)
{
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    for (pthread_t thread; pool.workers < wanted && pool.workers < MOST; pool.workers++)
        if (pthread_create(&thread, &attributes, worker_main, 0))
            break;
    pthread_attr_destroy(&attributes);
}

void run_chunks(long threads, long chunks, void (*body)(void *job, long chunk), void *job)
{
    if (threads <= 1 || chunks <= 1 || pthread_mutex_trylock(&pool.caller)) {
        for (long chunk = 0; chunk < chunks; chunk++)
            body(job, chunk);
        return;
    }
    start_workers(threads - 1);
    pool.body = body;
    pool.job = job;
    pool.chunks = chunks;
    pool.places = threads - 1;
    atomic_store(&pool.joined, 0);
    atomic_store(&pool.next, 0);
    atomic_store(&pool.open, true);
    atomic_fetch_add(&pool.jobs, 1);
    if (atomic_load(&pool.asleep)) {
        pthread_mutex_lock(&pool.sleep_lock);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.sleep_lock);
    }
    work();
    atomic_store(&pool.open, false);
    for (long waited = 0; atomic_load(&pool.working); waited++)
        if (waited < PATIENCE)
            rest();
        else
            sched_yield();
    pthread_mutex_unlock(&pool.caller);
}

/* A pool of threads that shares the chunks of one job.
 *
 * Whoever is awake takes the next chunk; the caller works too and waits only for chunks that somebody began. So a worker
 * that sleeps, or whose core is busy with something else, costs nothing: OpenMP's barrier would wait for it. */
#ifndef PETAL_THREAD_POOL_H
#define PETAL_THREAD_POOL_H

/* Calls body(job, chunk) for every chunk below `chunks`, on up to `threads` threads. Chunks must not depend on each
 * other. Callers from several threads are served one at a time; those that come meanwhile work alone. */
void run_chunks(long threads, long chunks, void (*body)(void *job, long chunk), void *job);

#endif

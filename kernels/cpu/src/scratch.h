/* Room that each thread keeps from call to call: fresh memory would cost a fault a page. */
#ifndef PETAL_SCRATCH_H
#define PETAL_SCRATCH_H

/* Copies of x, of w, the segments of a batch, what one task of attention needs. */
typedef enum { ROWS, WEIGHTS, SEGMENTS, TASK, ROOMS } room_t;

/* At least `bytes`, at a multiple of a page; null where memory lacks. What was there before is lost. */
void *scratch(room_t room, long bytes);

#endif

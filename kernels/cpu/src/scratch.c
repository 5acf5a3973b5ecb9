#include "scratch.h"

#include <stdlib.h>

enum { PAGE = 4096 };

void *scratch(room_t room, long bytes)
{
    static __thread void *rooms[ROOMS];
    static __thread long sizes[ROOMS];
    if (!rooms[room] || bytes > sizes[room]) {
        free(rooms[room]);
        rooms[room] = aligned_alloc(PAGE, (size_t)(bytes / PAGE + 1) * PAGE);
        sizes[room] = rooms[room] ? bytes : 0;
    }
    return rooms[room];
}

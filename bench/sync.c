// Has every fsync and fdatasync take SYNC_US microseconds instead of what the disk takes; by LD_PRELOAD.
#include <stdlib.h>
#include <time.h>

static int pause_us(void) {
    const char *given = getenv("SYNC_US");
    long us = given ? atol(given) : 300;
    struct timespec left = {us / 1000000, us % 1000000 * 1000};
    nanosleep(&left, NULL);
    return 0;
}

int fsync(int file) { (void)file; return pause_us(); }
int fdatasync(int file) { (void)file; return pause_us(); }

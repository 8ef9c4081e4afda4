/* Preloaded into a test process: makes the k-th armed system call fail, or write only half, as a bad disk would.
 *
 * Calls count only between arm() and disarm(), on any of open, write, fsync, rename, close. Built and driven by
 * test_atomic.py.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <sys/types.h>

static int armed, seen, target, failure; /* failure: an errno, or 0 for a short write */
static char last[16];

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

void arm(int k, int error) { seen = 0; target = k; failure = error; last[0] = 0; armed = 1; }
int disarm(void) { armed = 0; return seen; }
const char *failed_call(void) { return last; }

static int hit(const char *name) {
    if (!armed || ++seen != target) return 0;
    int i = 0;
    for (; name[i] && i < 15; i++) last[i] = name[i];
    last[i] = 0;
    return 1;
}

static int fails(const char *name) {
    if (!hit(name) || !failure) return 0;
    errno = failure;
    return 1;
}

ssize_t write(int fd, const void *data, size_t n) {
    if (!hit("write")) return REAL(write)(fd, data, n);
    if (!failure) return REAL(write)(fd, data, n > 1 ? n / 2 : n);
    errno = failure;
    return -1;
}

int fsync(int fd) { return fails("fsync") ? -1 : REAL(fsync)(fd); }
int rename(const char *from, const char *to) { return fails("rename") ? -1 : REAL(rename)(from, to); }

int close(int fd) { /* the descriptor is gone even when close reports an error */
    int bad = fails("close"), result = REAL(close)(fd);
    if (bad) errno = failure;
    return bad ? -1 : result;
}

#define OPEN(name)                                                   \
    int name(const char *path, int flags, ...) {                     \
        va_list rest;                                                \
        va_start(rest, flags);                                       \
        mode_t mode = (flags & O_CREAT) ? va_arg(rest, mode_t) : 0;  \
        va_end(rest);                                                \
        return fails("open") ? -1 : REAL(name)(path, flags, mode);   \
    }
OPEN(open)
OPEN(open64)

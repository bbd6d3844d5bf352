/* Counts what a process changes on disk, and kills it at the one that it is told.

   LD_PRELOAD=boundaries.so BOUNDARY_LOG=file   each boundary becomes a line of the file
                            BOUNDARY_KILL=n     SIGKILL instead of the n-th
                            BOUNDARY_FAIL=n:e   instead of it and all after it of its name, error number e
                            BOUNDARY_SLEEP=ms   each link takes so much longer
                            BOUNDARY_CLOCK=s    the clock of the day is so many seconds ahead; others are as they are

   A boundary is a call of link, unlink, rename, mkdir, fsync or fdatasync, or a write to the ledger's log. They
   are read at each call, since a forked child sets them after it was loaded. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static atomic_int counted;
static _Atomic(const char *) failing;

static int boundary(const char *name, const char *what)
{
    const char *log = getenv("BOUNDARY_LOG"), *kill_at = getenv("BOUNDARY_KILL"), *fail_at = getenv("BOUNDARY_FAIL");
    const char *sleep_for = getenv("BOUNDARY_SLEEP");
    if (sleep_for && !strcmp(name, "link"))
        usleep(1000 * atoi(sleep_for));
    if (!log && !kill_at && !fail_at)
        return 0;
    int number = atomic_fetch_add(&counted, 1) + 1;
    if (kill_at && number == atoi(kill_at))
        kill(getpid(), SIGKILL);
    if (log) {
        char line[4200];
        int size = snprintf(line, sizeof line, "%s %s\n", name, what ? what : "");
        int fd = open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
        if (fd >= 0) {
            (void)!write(fd, line, size < (int)sizeof line ? size : (int)sizeof line);
            close(fd);
        }
    }
    if (fail_at) {
        if (number == atoi(fail_at))
            failing = name;
        const char *colon = strchr(fail_at, ':');
        if (failing && !strcmp(failing, name) && colon)
            return atoi(colon + 1);
    }
    return 0;
}

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

#define STOP(name, what) \
    do { int error = boundary(name, what); if (error) { errno = error; return -1; } } while (0)

int link(const char *a, const char *b) { REAL(int, link, const char *, const char *); STOP("link", b); return real(a, b); }
int linkat(int d, const char *a, int e, const char *b, int f)
{ REAL(int, linkat, int, const char *, int, const char *, int); STOP("link", b); return real(d, a, e, b, f); }
int unlink(const char *a) { REAL(int, unlink, const char *); STOP("unlink", a); return real(a); }
int unlinkat(int d, const char *a, int f) { REAL(int, unlinkat, int, const char *, int); STOP("unlink", a); return real(d, a, f); }
int rmdir(const char *a) { REAL(int, rmdir, const char *); STOP("rmdir", a); return real(a); }
int rename(const char *a, const char *b) { REAL(int, rename, const char *, const char *); STOP("rename", b); return real(a, b); }
int renameat(int d, const char *a, int e, const char *b)
{ REAL(int, renameat, int, const char *, int, const char *); STOP("rename", b); return real(d, a, e, b); }
int mkdir(const char *a, mode_t m) { REAL(int, mkdir, const char *, mode_t); STOP("mkdir", a); return real(a, m); }
int mkdirat(int d, const char *a, mode_t m) { REAL(int, mkdirat, int, const char *, mode_t); STOP("mkdir", a); return real(d, a, m); }
int fsync(int fd) { REAL(int, fsync, int); STOP("fsync", ""); return real(fd); }
int fdatasync(int fd) { REAL(int, fdatasync, int); STOP("fsync", ""); return real(fd); }

static int is_ledger(int fd)
{
    char link_name[64], path[4096];
    snprintf(link_name, sizeof link_name, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link_name, path, sizeof path - 1);
    if (size < 0)
        return 0;
    path[size] = 0;
    return strstr(path, "ledger.db") != NULL;
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at)
{
    REAL(ssize_t, pwrite64, int, const void *, size_t, off64_t);
    if (is_ledger(fd))
        STOP("ledger", "");
    return real(fd, data, size, at);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) { return pwrite64(fd, data, size, at); }

int clock_gettime(clockid_t which, struct timespec *now)
{
    REAL(int, clock_gettime, clockid_t, struct timespec *);
    int result = real(which, now);
    const char *ahead = which == CLOCK_REALTIME ? getenv("BOUNDARY_CLOCK") : NULL;
    if (ahead)
        now->tv_sec += atol(ahead);
    return result;
}

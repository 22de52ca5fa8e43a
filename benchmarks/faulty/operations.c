/* Counts a process's file operations below one folder, and at a given one kills it, or fills the disk.

   Built and preloaded by benchmarks/faults.py; works on what calls the C library: Python, and Rust's standard library.
   An operation is what changes the disk: making, writing, renaming, cutting or deleting. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT = 0, KILL = 1, KILL_HALF_WRITTEN = 2, FILL = 3 };
static char root[PATH_MAX];
static size_t root_length;
static long at;
static int mode;
static atomic_long count;

void faults_arm(const char *folder, long n, int how) {
    root_length = strlen(strncpy(root, folder, PATH_MAX - 1));
    at = n;
    mode = how;
    count = 0;
}

long faults_count(void) { return count; }

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

static int below(const char *path) { return root_length && strncmp(path, root, root_length) == 0; }

static int folder_below(int folder) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return below(path);
}

static int concerns(int folder, const char *path) {
    if (!root_length) return 0;
    return path[0] == '/' ? below(path) : folder == AT_FDCWD ? 0 : folder_below(folder);
}

/* 1 where the operation must fail because the disk is full; counts it, and does not come back where the process dies before it. */
static int operation(int grows) {
    long n = ++count;
    if ((mode == KILL || mode == KILL_HALF_WRITTEN) && n == at) die();
    if (mode == FILL && grows && n >= at) {
        errno = ENOSPC;
        return 1;
    }
    return 0;
}

#define NEXT(name, type, ...)                          \
    static type (*next)(__VA_ARGS__);                  \
    if (!next) next = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

static ssize_t half(ssize_t (*write_)(int, const void *, size_t), int file, const void *bytes, size_t size) {
    if (mode == KILL_HALF_WRITTEN && count + 1 == at && size > 1) write_(file, bytes, size / 2);
    return 0;
}

ssize_t write(int file, const void *bytes, size_t size) {
    NEXT("write", ssize_t, int, const void *, size_t);
    if (root_length && folder_below(file)) {
        half(next, file, bytes, size);
        if (operation(1)) return -1;
    }
    return next(file, bytes, size);
}

ssize_t writev(int file, const struct iovec *parts, int number) {
    NEXT("writev", ssize_t, int, const struct iovec *, int);
    if (root_length && folder_below(file) && operation(1)) return -1;
    return next(file, parts, number);
}

#define OPEN(name)                                                                               \
    int name(const char *path, int flags, ...) {                                                 \
        NEXT(#name, int, const char *, int, ...);                                                \
        va_list rest;                                                                            \
        va_start(rest, flags);                                                                   \
        mode_t bits = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;                  \
        va_end(rest);                                                                            \
        if (flags & (O_CREAT | O_TRUNC) && concerns(AT_FDCWD, path) && operation(flags & O_CREAT)) return -1; \
        return next(path, flags, bits);                                                          \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                             \
    int name(int folder, const char *path, int flags, ...) {                                     \
        NEXT(#name, int, int, const char *, int, ...);                                           \
        va_list rest;                                                                            \
        va_start(rest, flags);                                                                   \
        mode_t bits = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;                  \
        va_end(rest);                                                                            \
        if (flags & (O_CREAT | O_TRUNC) && concerns(folder, path) && operation(flags & O_CREAT)) return -1; \
        return next(folder, path, flags, bits);                                                  \
    }
OPENAT(openat)
OPENAT(openat64)

int rename(const char *from, const char *to) {
    NEXT("rename", int, const char *, const char *);
    if (concerns(AT_FDCWD, to) && operation(0)) return -1;
    return next(from, to);
}

int renameat(int a, const char *from, int b, const char *to) {
    NEXT("renameat", int, int, const char *, int, const char *);
    if (concerns(b, to) && operation(0)) return -1;
    return next(a, from, b, to);
}

int unlink(const char *path) {
    NEXT("unlink", int, const char *);
    if (concerns(AT_FDCWD, path) && operation(0)) return -1;
    return next(path);
}

int unlinkat(int folder, const char *path, int flags) {
    NEXT("unlinkat", int, int, const char *, int);
    if (concerns(folder, path) && operation(0)) return -1;
    return next(folder, path, flags);
}

int rmdir(const char *path) {
    NEXT("rmdir", int, const char *);
    if (concerns(AT_FDCWD, path) && operation(0)) return -1;
    return next(path);
}

int mkdir(const char *path, mode_t bits) {
    NEXT("mkdir", int, const char *, mode_t);
    if (concerns(AT_FDCWD, path) && operation(1)) return -1;
    return next(path, bits);
}

int ftruncate(int file, off_t size) {
    NEXT("ftruncate", int, int, off_t);
    if (root_length && folder_below(file) && operation(0)) return -1;
    return next(file, size);
}

int ftruncate64(int file, off64_t size) {
    NEXT("ftruncate64", int, int, off64_t);
    if (root_length && folder_below(file) && operation(0)) return -1;
    return next(file, size);
}

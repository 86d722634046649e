/* Faults for tests: preloaded into a process, this library stands between it and the system's calls
 * that change files, and counts those that concern files below FAULTS_ROOT.
 *
 *   FAULTS_ROOT=DIR          which files
 *   FAULTS_KILL_AT=N         SIGKILL before the N-th call (and in the middle of it, if it writes and
 *                            FAULTS_TEAR is set: half of the bytes are written)
 *   FAULTS_FAIL_AT=N         the N-th call and all that follow ...
 *   FAULTS_FAIL_COUNT=C      ... or so many of them ...
 *   FAULTS_ERRNO=E           ... fail with this error
 *   FAULTS_FAIL_CALL=NAME    only calls of this name are counted and fail
 *   FAULTS_STRUCK=FILE       is made when a fault strikes
 *   FAULTS_LOG=FILE          every call is appended to this file, with what it wrote, so that the
 *                            state after a power failure can be put together (power_loss.py)
 *
 *   FAULTS_BOOT=FILE         is read in place of the system's boot id
 *
 * A record of the log, little endian: u32 length of the name, of the path, of the other path (or
 * data), i64 offset; then these bytes. Reads (pread, preadv) below FAULTS_ROOT can fail, too, and are
 * counted only when FAULTS_FAIL_CALL names them.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static long calls;
static int log_file = -1;

static long number_of(const char *name) {
    const char *text = getenv(name);
    return text ? atol(text) : -1;
}

static int is_below_root(const char *path) {
    const char *root = getenv("FAULTS_ROOT");
    size_t length;
    if (!root || !path) return 0;
    length = strlen(root);
    return strncmp(path, root, length) == 0 && (path[length] == '/' || path[length] == 0);
}

/* The absolute path of what a call names; 0 if it is not below the root. */
static int path_at(int folder, const char *name, char *out) {
    char parent[PATH_MAX], link[64];
    if (name[0] == '/') {
        snprintf(out, PATH_MAX, "%s", name);
        return is_below_root(out);
    }
    if (folder == AT_FDCWD) {
        if (!getcwd(parent, sizeof parent)) return 0;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t length = readlink(link, parent, sizeof parent - 1);
        if (length < 0) return 0;
        parent[length] = 0;
    }
    if (snprintf(out, PATH_MAX, "%s/%s", parent, name) >= PATH_MAX) return 0;
    return is_below_root(out);
}

static int path_of(int descriptor, char *out) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, out, PATH_MAX - 1);
    if (length < 0) return 0;
    out[length] = 0;
    return is_below_root(out);
}

static void record(const char *name, const char *path, const void *other, size_t length,
                   int64_t offset) {
    uint32_t sizes[3] = {(uint32_t)strlen(name), (uint32_t)strlen(path), (uint32_t)length};
    struct iovec parts[5] = {{sizes, sizeof sizes},
                             {&offset, sizeof offset},
                             {(void *)name, sizes[0]},
                             {(void *)path, sizes[1]},
                             {(void *)other, length}};
    if (!getenv("FAULTS_LOG")) return;
    if (log_file < 0)
        log_file = REAL(open)(getenv("FAULTS_LOG"), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    if (REAL(writev)(log_file, parts, 5) < 0) abort();
}

enum { GO_ON, TEAR, FAIL };

static void strikes(void) {
    const char *path = getenv("FAULTS_STRUCK");
    if (path) close(REAL(open)(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0666));
}

/* Counts a call; kills the process if its time has come. */
static int reached(const char *name) {
    const char *only = getenv("FAULTS_FAIL_CALL");
    long number, first = number_of("FAULTS_FAIL_AT"), count = number_of("FAULTS_FAIL_COUNT");
    if (only ? strcmp(only, name) != 0 : strcmp(name, "read") == 0) return GO_ON;
    number = ++calls;
    if (number == number_of("FAULTS_KILL_AT")) {
        strikes();
        if (getenv("FAULTS_TEAR")) return TEAR;
        kill(getpid(), SIGKILL);
    }
    if (first > 0 && number >= first && (count < 0 || number < first + count)) {
        strikes();
        errno = (int)number_of("FAULTS_ERRNO");
        return FAIL;
    }
    return GO_ON;
}

#define COUNT(name, failure)                  \
    switch (reached(name)) {                  \
    case TEAR: kill(getpid(), SIGKILL); break; \
    case FAIL: pthread_mutex_unlock(&lock); return failure; \
    default: break;                           \
    }

static ssize_t written(const char *name, int descriptor, const void *data, size_t length,
                       int64_t offset) {
    char path[PATH_MAX];
    ssize_t done;
    int is_ours = path_of(descriptor, path);
    int state = GO_ON;
    if (is_ours) {
        pthread_mutex_lock(&lock);
        state = reached(name);
        if (state == FAIL) {
            pthread_mutex_unlock(&lock);
            return -1;
        }
        if (state == TEAR) length /= 2;
        if (offset < 0) { /* at the end, or where the file stands */
            int flags = fcntl(descriptor, F_GETFL);
            offset = flags & O_APPEND ? lseek(descriptor, 0, SEEK_END)
                                      : lseek(descriptor, 0, SEEK_CUR);
            done = REAL(write)(descriptor, data, length);
        } else {
            done = REAL(pwrite)(descriptor, data, length, offset);
        }
        if (done > 0) record("write", path, data, (size_t)done, offset);
        if (state == TEAR) kill(getpid(), SIGKILL);
        pthread_mutex_unlock(&lock);
        return done;
    }
    return offset < 0 ? REAL(write)(descriptor, data, length)
                      : REAL(pwrite)(descriptor, data, length, offset);
}

ssize_t write(int descriptor, const void *data, size_t length) {
    return written("write", descriptor, data, length, -1);
}

ssize_t pwrite(int descriptor, const void *data, size_t length, off_t offset) {
    return written("pwrite", descriptor, data, length, offset);
}

ssize_t pwrite64(int descriptor, const void *data, size_t length, off64_t offset) {
    return written("pwrite", descriptor, data, length, offset);
}

ssize_t sendfile(int out, int in, off_t *offset, size_t length) {
    char path[PATH_MAX], data[65536];
    ssize_t got;
    if (!path_of(out, path)) return REAL(sendfile)(out, in, offset, length);
    got = REAL(pread)(in, data, length < sizeof data ? length : sizeof data, offset ? *offset : 0);
    if (got <= 0) return got;
    got = written("write", out, data, (size_t)got, -1);
    if (got > 0 && offset) *offset += got;
    return got;
}

ssize_t sendfile64(int out, int in, off64_t *offset, size_t length) {
    return sendfile(out, in, (off_t *)offset, length);
}

static ssize_t read_vector(int descriptor, const struct iovec *parts, int count, off_t offset) {
    char path[PATH_MAX];
    if (path_of(descriptor, path)) {
        pthread_mutex_lock(&lock);
        COUNT("read", -1)
        pthread_mutex_unlock(&lock);
    }
    return REAL(preadv)(descriptor, parts, count, offset);
}

ssize_t preadv(int descriptor, const struct iovec *parts, int count, off_t offset) {
    return read_vector(descriptor, parts, count, offset);
}

ssize_t preadv64(int descriptor, const struct iovec *parts, int count, off64_t offset) {
    return read_vector(descriptor, parts, count, offset);
}

ssize_t pread(int descriptor, void *data, size_t length, off_t offset) {
    struct iovec part = {data, length};
    return read_vector(descriptor, &part, 1, offset);
}

ssize_t pread64(int descriptor, void *data, size_t length, off64_t offset) {
    return pread(descriptor, data, length, offset);
}

static int synced(int descriptor, int (*real)(int)) {
    char path[PATH_MAX];
    int result;
    if (!path_of(descriptor, path)) return real(descriptor);
    pthread_mutex_lock(&lock);
    COUNT("fsync", -1)
    result = real(descriptor);
    if (!result) record("fsync", path, "", 0, 0);
    pthread_mutex_unlock(&lock);
    return result;
}

int fsync(int descriptor) { return synced(descriptor, REAL(fsync)); }
int fdatasync(int descriptor) { return synced(descriptor, REAL(fdatasync)); }

static int truncated(int descriptor, off_t length) {
    char path[PATH_MAX];
    int result;
    if (!path_of(descriptor, path)) return REAL(ftruncate)(descriptor, length);
    pthread_mutex_lock(&lock);
    COUNT("ftruncate", -1)
    result = REAL(ftruncate)(descriptor, length);
    if (!result) record("truncate", path, "", 0, length);
    pthread_mutex_unlock(&lock);
    return result;
}

int ftruncate(int descriptor, off_t length) { return truncated(descriptor, length); }
int ftruncate64(int descriptor, off64_t length) { return truncated(descriptor, length); }

static int allocated(int descriptor, off_t offset, off_t length) {
    char path[PATH_MAX];
    int result;
    if (!path_of(descriptor, path)) return REAL(posix_fallocate)(descriptor, offset, length);
    pthread_mutex_lock(&lock);
    COUNT("fallocate", errno)
    result = REAL(posix_fallocate)(descriptor, offset, length);
    if (!result) record("allocate", path, "", 0, offset + length);
    pthread_mutex_unlock(&lock);
    return result;
}

int posix_fallocate(int descriptor, off_t offset, off_t length) {
    return allocated(descriptor, offset, length);
}

int posix_fallocate64(int descriptor, off64_t offset, off64_t length) {
    return allocated(descriptor, offset, length);
}

#define FROM_TO(name, label)                          \
    char source[PATH_MAX], target[PATH_MAX];          \
    int result;                                       \
    if (!path_at(AT_FDCWD, from, source) || !path_at(AT_FDCWD, to, target)) \
        return REAL(name)(from, to);                  \
    pthread_mutex_lock(&lock);                        \
    COUNT(label, -1)                                  \
    result = REAL(name)(from, to);                    \
    if (!result) record(label, source, target, strlen(target), 0); \
    pthread_mutex_unlock(&lock);                      \
    return result;

int rename(const char *from, const char *to) { FROM_TO(rename, "rename") }
int link(const char *from, const char *to) { FROM_TO(link, "link") }

#define ON_PATH(name, label, ...)                     \
    char full[PATH_MAX];                              \
    int result;                                       \
    if (!path_at(AT_FDCWD, path, full)) return REAL(name)(__VA_ARGS__); \
    pthread_mutex_lock(&lock);                        \
    COUNT(label, -1)                                  \
    result = REAL(name)(__VA_ARGS__);                 \
    if (!result) record(label, full, "", 0, 0);       \
    pthread_mutex_unlock(&lock);                      \
    return result;

int unlink(const char *path) { ON_PATH(unlink, "unlink", path) }
int rmdir(const char *path) { ON_PATH(rmdir, "rmdir", path) }
int mkdir(const char *path, mode_t mode) { ON_PATH(mkdir, "mkdir", path, mode) }

static int opened(const char *path, int flags, mode_t mode) {
    char full[PATH_MAX];
    int descriptor, is_new;
    if (getenv("FAULTS_BOOT") && !strcmp(path, "/proc/sys/kernel/random/boot_id"))
        path = getenv("FAULTS_BOOT");
    if (!(flags & (O_CREAT | O_TRUNC)) || !path_at(AT_FDCWD, path, full))
        return REAL(open)(path, flags, mode);
    pthread_mutex_lock(&lock);
    is_new = access(full, F_OK) != 0;
    if (is_new || flags & O_TRUNC) {
        COUNT("open", -1)
    }
    descriptor = REAL(open)(path, flags, mode);
    if (descriptor >= 0 && is_new) record("create", full, "", 0, 0);
    if (descriptor >= 0 && !is_new && flags & O_TRUNC) record("truncate", full, "", 0, 0);
    pthread_mutex_unlock(&lock);
    return descriptor;
}

#define OPEN(name)                                    \
    int name(const char *path, int flags, ...) {      \
        mode_t mode = 0;                              \
        if (flags & (O_CREAT | O_TMPFILE)) {          \
            va_list more;                             \
            va_start(more, flags);                    \
            mode = va_arg(more, mode_t);              \
            va_end(more);                             \
        }                                             \
        return opened(path, flags, mode);             \
    }

OPEN(open)
OPEN(open64)

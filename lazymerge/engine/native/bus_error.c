/* Last words after a bus error.
 *
 * A mapped file that is truncated, or that the disk cannot read, raises SIGBUS where its page is
 * touched, and the process is gone without a word. While inputs are mapped, this handler says which
 * file is shorter than it was, and how to go on, and ends the process with exit code 1.
 *
 * It calls nothing but write, fstat, strlen, sigaction and _exit, which a signal handler may (POSIX,
 * 2.4.3). A bus error of another kind (a misaligned address, a signal that somebody sent) is left to
 * whoever handled them before.
 */
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* A merge that maps inputs at this time. */
typedef struct Merge {
    char *advice; /* how it can be gone on with; NULL where the place is free */
} Merge;

typedef struct Watched {
    struct Watched *next;
    Merge *merge; /* NULL where the place is free */
    int descriptor;
    int64_t size;
    char *path;
} Watched;

/* Places are added and used again, never given back: the handler may be reading them. */
#define MOST_MERGES 64
static Merge merges[MOST_MERGES];
static Watched *first;
static struct sigaction before;
static int users;

static void say(const char *text) {
    ssize_t ignored = write(STDERR_FILENO, text, strlen(text));
    (void)ignored;
}

static void on_bus_error(int number, siginfo_t *information, void *context) {
    int found = 0;
    (void)context;
    if (information->si_code != BUS_ADRERR) {
#ifdef BUS_MCEERR_AR
        if (information->si_code != BUS_MCEERR_AR)
#endif
        {
            sigaction(number, &before, NULL);
            if (information->si_code <= 0) raise(number); /* sent: it does not come again by itself */
            return;
        }
    }
    say("\nlazymerge: ");
    for (Watched *each = __atomic_load_n(&first, __ATOMIC_ACQUIRE); each && !found;
         each = each->next) {
        struct stat status;
        Merge *merge = __atomic_load_n(&each->merge, __ATOMIC_ACQUIRE);
        if (merge && fstat(each->descriptor, &status) == 0 && status.st_size < each->size) {
            say(each->path);
            say(" became shorter while it was being read");
            say(merge->advice);
            found = 1;
        }
    }
    if (!found) {
        say("an input that is mapped cannot be read (bus error)");
        for (int i = 0; i < MOST_MERGES; i++) {
            const char *advice = __atomic_load_n(&merges[i].advice, __ATOMIC_ACQUIRE);
            if (advice) say(advice);
        }
    }
    _exit(1);
}

/* A merge begins to map inputs; what is said of it after a file's name. The handler is there from
 * now on, until lm_bus_error_end has been called as often. Callers take turns. Returns the merge's
 * number, -1 if the handler cannot be installed. */
int lm_bus_error_begin(const char *text) {
    struct sigaction action;
    char *copy = NULL;
    int number = 0;
    while (number < MOST_MERGES && merges[number].advice) number++;
    if (number == MOST_MERGES || !(copy = strdup(text))) return -1;
    if (!users) {
        memset(&action, 0, sizeof action);
        action.sa_sigaction = on_bus_error;
        action.sa_flags = SA_SIGINFO;
        sigemptyset(&action.sa_mask);
        if (sigaction(SIGBUS, &action, &before) != 0) {
            free(copy);
            return -1;
        }
    }
    users++;
    __atomic_store_n(&merges[number].advice, copy, __ATOMIC_RELEASE);
    return number;
}

/* Adds a file of a merge's that must not become shorter than it is. Callers take turns. */
int lm_bus_error_watch(int number, int descriptor, int64_t size, const char *path) {
    char *copy = strdup(path);
    Watched *place = first;
    if (!copy) return -1;
    while (place && place->merge) place = place->next;
    int is_new = !place;
    if (is_new && !(place = calloc(1, sizeof *place))) {
        free(copy);
        return -1;
    }
    free(place->path);
    place->descriptor = descriptor;
    place->size = size;
    place->path = copy;
    if (is_new) place->next = first;
    __atomic_store_n(&place->merge, &merges[number], __ATOMIC_RELEASE);
    if (is_new) __atomic_store_n(&first, place, __ATOMIC_RELEASE);
    return 0;
}

/* A merge's files are watched no more; everything is as it was when the last has called this.
 * Before they are closed: their numbers are given again. Callers take turns. */
void lm_bus_error_end(int number) {
    char *advice = merges[number].advice;
    for (Watched *each = first; each; each = each->next)
        if (each->merge == &merges[number]) __atomic_store_n(&each->merge, NULL, __ATOMIC_RELEASE);
    __atomic_store_n(&merges[number].advice, NULL, __ATOMIC_RELEASE);
    free(advice);
    if (!--users) sigaction(SIGBUS, &before, NULL);
}

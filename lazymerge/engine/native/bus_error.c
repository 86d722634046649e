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

typedef struct {
    int descriptor;
    int64_t size;
    char *path;
} Watched;

static Watched *watched;
static int watched_count;
static char *advice;
static struct sigaction before;
static int users; /* merges that map inputs in this process at this time */

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
    for (int i = 0; i < watched_count && !found; i++) {
        struct stat status;
        if (fstat(watched[i].descriptor, &status) == 0 && status.st_size < watched[i].size) {
            say(watched[i].path);
            say(" became shorter while it was being read");
            found = 1;
        }
    }
    if (!found) say("an input that is mapped cannot be read (bus error)");
    say(advice);
    _exit(1);
}

/* What is said after the file's name; the handler is there from now on, until lm_bus_error_end has
 * been called as often. Callers take turns. Returns 0 if it could be installed. */
int lm_bus_error_begin(const char *text) {
    struct sigaction action;
    char *copy = strdup(text), *old = advice;
    if (!copy) return -1;
    advice = copy;
    free(old);
    if (users++) return 0;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = on_bus_error;
    action.sa_flags = SA_SIGINFO;
    sigemptyset(&action.sa_mask);
    if (sigaction(SIGBUS, &action, &before) == 0) return 0;
    users--;
    return -1;
}

/* Adds a file that must not become shorter than it is. Callers take turns. */
int lm_bus_error_watch(int descriptor, int64_t size, const char *path) {
    Watched *grown = realloc(watched, (size_t)(watched_count + 1) * sizeof *watched);
    if (!grown) return -1;
    watched = grown;
    watched[watched_count] = (Watched){descriptor, size, strdup(path)};
    if (!watched[watched_count].path) return -1;
    watched_count++;
    return 0;
}

/* Everything as it was, when the last has called this. Callers take turns. */
void lm_bus_error_end(void) {
    if (!users || --users) return;
    sigaction(SIGBUS, &before, NULL);
    for (int i = 0; i < watched_count; i++) free(watched[i].path);
    watched_count = 0;
}

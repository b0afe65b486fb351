/* A pass of a large model is some hundred maps, with little between them. A thread that sleeps between two maps takes
 * longer to wake than a map takes, above all on a virtual machine. So these threads look for work for a while before
 * they sleep, and the one that calls them looks for their end. (OpenMP's would do so everywhere or nowhere.)
 */
#include "team.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <time.h>
#include <unistd.h>

#define MOST_THREADS 64
/* Nanoseconds that a thread looks for work. */
#define PATIENCE 300000

static struct {
    pthread_mutex_t used;  /* by the thread whose work it is */
    pthread_mutex_t lock;  /* of `asleep`, and of `call` where somebody is */
    pthread_cond_t wake;
    _Atomic uint64_t call; /* the number of the present work */
    _Atomic int64_t left;  /* threads that have not done their part of it */
    int64_t asleep, count; /* of them sleep; are there */
    pid_t owner;           /* the process that they are in: a forked one has none */
    work run;
    void *with;
    int64_t parts;
} team = {.used = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

/* Where a thread begins: its part, and the last work before it came. */
static struct member {
    int64_t part;
    uint64_t seen;
} members[MOST_THREADS];

static inline void rest(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    sched_yield();
#endif
}

static int64_t nanoseconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Returns when there is another work than `seen`. */
static void await(uint64_t seen) {
    for (int64_t until = nanoseconds() + PATIENCE; nanoseconds() < until;)
        for (int i = 0; i < 32; i++) {
            if (atomic_load_explicit(&team.call, memory_order_acquire) != seen) return;
            rest();
        }
    pthread_mutex_lock(&team.lock);
    team.asleep++;
    while (atomic_load(&team.call) == seen) pthread_cond_wait(&team.wake, &team.lock);
    team.asleep--;
    pthread_mutex_unlock(&team.lock);
}

static void *serve(void *own) {
    struct member me = *(struct member *)own;
    for (;; me.seen++) {
        await(me.seen);
        if (me.part < team.parts) team.run(team.with, me.part, team.parts);
        atomic_fetch_sub_explicit(&team.left, 1, memory_order_release);
    }
    return NULL;
}

/* Has `count` threads beside this one, or as many as can be had. */
static void gather(int64_t count) {
    if (team.owner != getpid()) {
        team.owner = getpid();
        team.count = team.asleep = 0;
        pthread_mutex_init(&team.lock, NULL);
        pthread_cond_init(&team.wake, NULL);
    }
    for (; team.count < count && team.count < MOST_THREADS; team.count++) {
        pthread_t thread;
        members[team.count] = (struct member){team.count + 1, atomic_load(&team.call)};
        if (pthread_create(&thread, NULL, serve, members + team.count)) break;
        pthread_detach(thread);
    }
}

void share(work run, void *with, int64_t parts) {
    if (parts < 2 || pthread_mutex_trylock(&team.used)) {
        /* Alone, or the others have another's work. */
        for (int64_t part = 0; part < parts; part++) run(with, part, parts);
        return;
    }
    gather(parts - 1);
    team.run = run;
    team.with = with;
    team.parts = parts;
    atomic_store(&team.left, team.count);
    pthread_mutex_lock(&team.lock);
    atomic_fetch_add_explicit(&team.call, 1, memory_order_release);
    if (team.asleep) pthread_cond_broadcast(&team.wake);
    pthread_mutex_unlock(&team.lock);
    run(with, 0, parts);
    for (int64_t part = team.count + 1; part < parts; part++) run(with, part, parts);
    for (int64_t looks = 0; atomic_load_explicit(&team.left, memory_order_acquire); looks++)
        if (looks < 10000)
            rest();
        else
            sched_yield();
    pthread_mutex_unlock(&team.used);
}

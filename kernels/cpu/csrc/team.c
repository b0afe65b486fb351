/* A pass of a large model is some hundred maps, one of a small model a few layers, with little between them. A thread
 * that sleeps between two takes longer to wake than they take, above all on a virtual machine. So these threads look
 * for work for a while before they sleep, and the one that calls them looks for their end. (OpenMP's would do so
 * everywhere or nowhere.)
 *
 * Work has several parts for each thread, and who is there takes the next. So nobody waits for a thread that others on
 * the machine keep from its processor, but for the part that it has begun.
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
    _Atomic uint64_t call; /* the present work's number << 32 | how many parts it has << 16 | the next of them */
    _Atomic int64_t done;  /* parts of it that are done */
    int64_t asleep, count; /* of the threads sleep; are there */
    pid_t owner;           /* the process that they are in: a forked one has none */
    work run;
    void *with;
    int64_t parts;
} team = {.used = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

/* Where a thread begins: its place behind the one that calls, and the last work before it came. */
static struct member {
    int64_t place;
    uint32_t seen;
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

static uint32_t number_of(uint64_t call) { return (uint32_t)(call >> 32); }

/* Returns the number of the work after `seen`, when there is one. */
static uint32_t await(uint32_t seen) {
    uint32_t now;
    for (int64_t until = nanoseconds() + PATIENCE; nanoseconds() < until; sched_yield())
        for (int i = 0; i < 32; i++) {
            if ((now = number_of(atomic_load_explicit(&team.call, memory_order_acquire))) != seen) return now;
            rest();
        }
    pthread_mutex_lock(&team.lock);
    team.asleep++;
    while ((now = number_of(atomic_load(&team.call))) == seen) pthread_cond_wait(&team.wake, &team.lock);
    team.asleep--;
    pthread_mutex_unlock(&team.lock);
    return now;
}

static int64_t parts_of(uint64_t call) { return (int64_t)(call >> 16 & 0xffff); }

/* Does parts of the work of that number while it has any. Who has a part keeps the work from its end, and with it what
 * `team` says of it. */
static void help(uint32_t number) {
    uint64_t call = atomic_load_explicit(&team.call, memory_order_acquire);
    while (number_of(call) == number && (int64_t)(call & 0xffff) < parts_of(call)) {
        if (!atomic_compare_exchange_weak_explicit(&team.call, &call, call + 1, memory_order_acq_rel,
                                                   memory_order_acquire))
            continue;
        team.run(team.with, (int64_t)(call & 0xffff), team.parts);
        atomic_fetch_add_explicit(&team.done, 1, memory_order_release);
        call = atomic_load_explicit(&team.call, memory_order_acquire);
    }
}

static void *serve(void *own) {
    struct member me = *(struct member *)own;
    for (;;) {
        me.seen = await(me.seen);
        if (me.place < parts_of(atomic_load(&team.call)) / PARTS_EACH) help(me.seen);
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
        members[team.count] = (struct member){team.count + 1, number_of(atomic_load(&team.call))};
        if (pthread_create(&thread, NULL, serve, members + team.count)) break;
        pthread_detach(thread);
    }
}

void share(work run, void *with, int64_t threads) {
    if (threads < 2 || pthread_mutex_trylock(&team.used)) {
        /* Alone, or the others have another's work. */
        run(with, 0, 1);
        return;
    }
    gather(threads - 1);
    team.run = run;
    team.with = with;
    team.parts = PARTS_EACH * (threads <= MOST_THREADS ? threads : MOST_THREADS);
    atomic_store(&team.done, 0);
    uint32_t number = number_of(atomic_load(&team.call)) + 1;
    pthread_mutex_lock(&team.lock);
    atomic_store_explicit(&team.call, (uint64_t)number << 32 | (uint64_t)team.parts << 16, memory_order_release);
    if (team.asleep) pthread_cond_broadcast(&team.wake);
    pthread_mutex_unlock(&team.lock);
    help(number);
    for (int64_t looks = 0; atomic_load_explicit(&team.done, memory_order_acquire) < team.parts; looks++)
        if (looks < 1000)
            rest();
        else
            sched_yield();
    pthread_mutex_unlock(&team.used);
}

struct items {
    item_work run;
    void *with;
    int64_t count;
    _Atomic int64_t next;
};

static void take(void *with, int64_t part, int64_t parts) {
    struct items *all = with;
    (void)parts;
    for (int64_t i; (i = atomic_fetch_add(&all->next, 1)) < all->count;) all->run(all->with, i, part);
}

void share_out(item_work run, void *with, int64_t count, int64_t threads) {
    struct items all = {.run = run, .with = with, .count = count};
    share(take, &all, threads < count ? threads : count);
}

/* Where the threads of the kernels run. */
#define _GNU_SOURCE /* sched_getcpu */
#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(_OPENMP) && defined(__linux__)
#include <sched.h>
#include <unistd.h>
#endif

static inline int thread_number(void) {
#if defined(_OPENMP)
    return omp_get_thread_num();
#else
    return 0;
#endif
}

/* A thread that has slept may be woken on the very CPU where the one that waits for it spins, and be left there for
 * tens of milliseconds beside an idle CPU. So the first thread says where it is, and the others leave that place. */
#if defined(_OPENMP) && defined(__linux__)
static inline int this_cpu(void) { return sched_getcpu(); }

static __attribute__((noinline, unused)) void leave_cpu(int taken) {
    cpu_set_t allowed;
    if (taken < 0 || sched_getaffinity(getpid(), sizeof allowed, &allowed)) return;
    CPU_CLR(taken, &allowed);
    if (CPU_COUNT(&allowed)) sched_setaffinity(0, sizeof allowed, &allowed);
}

static inline void keep_apart(int first_cpu) {
    if (thread_number() && sched_getcpu() == first_cpu) leave_cpu(first_cpu);
}
#else
static inline int this_cpu(void) { return -1; }
static inline void keep_apart(int first_cpu) { (void)first_cpu; }
#endif

/*
 * shim.c - shared pages under the file mappings of a program that does not know of them: what its thread does all the
 * time, and how that begins, pauses, ends and goes on in forked children. docs/preload.md is the design.
 *
 * What the thread does it with shim_parts.h lists; what is put in front of libc's functions is preload.c's.
 */
#include "shim_parts.h"

#include <asm/unistd.h>
#include <limits.h>
#include <linux/close_range.h>
#include <sys/prctl.h>
#include <sys/resource.h>

enum {
	MS_SETTLE = 50, /* from a new mapping to the look at it */
	MS_START = 300, /* programs that end sooner cost the agent nothing, and themselves next to nothing */
	MS_RETRY_FIRST = 200,
	MS_RETRY_MOST = 5000,
	MS_LOOK_MOST = 8000 /* longest time between two looks at a program that maps nothing */
};

static _Atomic bool watching;
/* With the lock. */
static unsigned stops; /* sa_shim_resume is to come so often */
static bool retired;   /* for good */
static struct sa_held fork_held;

bool sa_shim_watches(void)
{
	return atomic_load_explicit(&watching, memory_order_relaxed);
}

/* -------------------------------------------------------------------------------------------------- the thread */

/* How large the address space is, in pages: a cheap look whether a library has come. */
static uint64_t address_space(void)
{
	return sa_first_number("/proc/self/statm");
}

/* Until the connection ends, or the thread is to. */
static bool serve(void)
{
	int64_t look_at = sa_now_ms();
	int64_t look_pause = 0;
	uint64_t size = 0;
	int looks = 0; /* that follow a change: libraries are taken at the second one */
	bool go = true;

	if (!sa_link_send(SA_UNCHANGED, NULL, 0, -1))
		return true;
	while (go) {
		int64_t now = sa_now_ms();
		bool arrived;

		if (now >= look_at) {
			const bool news = atomic_load(&sa_dirty) || address_space() != size;

			looks = news ? 2 : looks;
			look_pause = looks ? MS_LATE + MS_SETTLE : look_pause * 2;
			look_pause = look_pause < MS_LOOK_MOST ? look_pause : MS_LOOK_MOST;
			if (looks) {
				looks--;
				sa_look();
				sa_files_open();
			}
			size = address_space();
			if (!sa_files_tell())
				return true;
			now = sa_now_ms();
			look_at = now + look_pause;
		}
		if (!sa_files_drop_unused())
			return true;
		if (atomic_load(&sa_dirty) && look_at > now + MS_SETTLE)
			look_at = now + MS_SETTLE;
		arrived = sa_link_wait(look_at > now ? look_at - now : 0, &go);
		if (go && arrived && !sa_link_take(sa_swap_answer))
			return true;
	}
	return false;
}

/* Without an agent: every page the file's, and nothing kept of the connection. */
static void hang_up(void)
{
	sa_files_put_back();
	sa_link_close(); /* not before: an agent that is there takes it for our having let go */
	sa_swap_forget();
}

static void thread_main(void)
{
	int64_t pause = MS_RETRY_FIRST;
	bool go;

	/* Its own table of descriptors from here on, an empty one. */
	if (sa_call3(__NR_close_range, 0, UINT_MAX, CLOSE_RANGE_UNSHARE) < 0)
		return;                               /* Linux 5.9 */
	(void)sa_call3(__NR_chdir, sa_at("/"), 0, 0); /* not to hold a folder; if it cannot, it does */
	(void)sa_call3(__NR_prctl, PR_SET_NAME, sa_at("sharearea"), 0);
	if (!sa_wait_begin())
		return;
	sa_swap_begin();
	for (go = sa_pause_ms(MS_START); go; go = go && sa_pause_ms(pause)) {
		const int64_t begun = sa_now_ms();

		if (sa_link_connect()) {
			go = serve();
			hang_up();
		}
		/* A connection that ends at once is not tried again at once. */
		pause = sa_now_ms() - begun > 1000 ? MS_RETRY_FIRST : pause * 2;
		pause = pause < MS_RETRY_MOST ? pause : MS_RETRY_MOST;
	}
}

/* ------------------------------------------------------------------------------------------- start, stop, fork */

/* With the lock or alone. Files are the thread's: a new one begins with none. */
static void start_thread(void)
{
	uint64_t signals;

	sa_regions_forget_files();
	sa_files_forget();
	sa_look_forget();
	sa_link_forget();
	if (!sa_children_begin())
		return;
	atomic_store(&sa_dirty, true);
	sa_signals_block(&signals);
	if (sa_thread_make(thread_main))
		atomic_store(&watching, true);
	sa_signals_restore(&signals);
}

void sa_shim_start(const char *socket, bool whole)
{
	struct rlimit limit;

	if (!sa_link_aim(socket))
		return;
	if (sa_call(__NR_prlimit64, 0, RLIMIT_AS, 0, sa_at(&limit), 0, 0) < 0 || limit.rlim_cur != RLIM_INFINITY)
		return;
	if (!sa_is_unfiltered())
		return;
	sa_look_begin(whole);
	start_thread();
}

void sa_shim_stop(bool forever)
{
	const int64_t end = sa_now_ms() + MS_PATIENCE;
	struct sa_held held;

	if (!sa_shim_watches() || !sa_thread_is_ours())
		return;
	sa_shim_lock(&held);
	(void)sa_regions_put_back_all(); /* what cannot be put back the thread tries until it can */
	atomic_store(&sa_stopping, true);
	stops += !forever;
	if (forever) {
		retired = true;
		atomic_store(&watching, false);
	}
	sa_shim_unlock(&held);
	sa_thread_wake();
	sa_thread_await_end(end);
}

void sa_shim_resume(void)
{
	struct sa_held held;

	if (!sa_shim_watches() || !sa_thread_is_ours())
		return;
	sa_shim_lock(&held);
	stops -= stops > 0;
	/* A thread that has not ended in time (its disk hangs) is the last one of this process. */
	if (!retired && stops == 0 && !sa_thread_runs() && atomic_load(&sa_stopping))
		start_thread();
	sa_shim_unlock(&held);
}

void sa_shim_before_fork(void)
{
	sa_shim_lock(&fork_held);
	sa_children_fork(sa_regions_are_shared());
}

void sa_shim_after_fork_parent(void)
{
	const struct sa_held held = fork_held;

	sa_shim_unlock(&held);
}

void sa_shim_after_fork_child(void)
{
	const struct sa_held held = fork_held;

	sa_regions_after_fork();
	sa_children_done();
	sa_thread_none();
	stops = 0;
	if (sa_shim_watches() && !retired)
		start_thread();
	sa_shim_unlock(&held);
}

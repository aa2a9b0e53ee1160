/*
 * stress.c - a program that maps, forks, remaps, protects and unmaps at random while its files change, and checks every
 * byte that it reads. It knows nothing of shared pages; test_stress.py runs it with the shim and changes the files.
 *
 * usage: stress SEED THREADS FILE...   a FILE is KIND:PAGES:PATH:COUNTERS. It runs until its standard input ends, then
 * prints what it did as JSON, and ends with 1 if a byte was wrong.
 *
 * Every word of a file is generation << 20 | page. Whoever rewrites a file in place says in COUNTERS, a file of two
 * numbers, which generation was begun and which one is done. Kind w: a page may show no generation before the one that
 * was done when the reading began, nor one that was not begun when it ended. Kind r: the file is replaced by rename,
 * never rewritten; a mapping shows for ever what read(2) gave when it was made.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = 4096, WORDS = PAGE / 8, MOST_PAGES = 128, MAPPINGS = 12, FILES = 8, THREADS = 16, CHILDREN = 4 };

enum state { OF_FILE, OWN, GONE };

struct file {
	bool replaced;
	unsigned pages;
	const char *path;
	const _Atomic uint64_t *counters; /* begun, done */
};

struct mapping {
	uint64_t *at; /* NULL: none */
	unsigned pages;
	unsigned first;
	const struct file *file;
	uint64_t generation; /* of a file that is replaced */
	enum state state[MOST_PAGES];
	uint64_t own[MOST_PAGES]; /* word that fills a page of the program's own */
};

static struct file files[FILES];
static unsigned nfiles;
static _Atomic bool ending;
static _Atomic unsigned long counts[16], wrong;
static const char *const names[] = {"map",  "check", "unmap", "protect", "remap",  "advise",
                                    "fork", "spawn", "over",  "signal",  "pages"};
extern char **environ;

struct thread {
	uint64_t random;
	struct mapping mappings[MAPPINGS];
	pid_t children[CHILDREN];
};

static unsigned pick(struct thread *thread, unsigned below)
{
	thread->random = thread->random * 6364136223846793005ULL + 1442695040888963407ULL;
	return (unsigned)(thread->random >> 33) % below;
}

__attribute__((format(printf, 1, 2))) static void fault(const char *format, ...)
{
	char text[512];
	va_list rest;
	int n;

	va_start(rest, format);
	n = vsnprintf(text, sizeof text, format, rest);
	va_end(rest);
	if (atomic_fetch_add(&wrong, 1) < 20 && write(2, text, (size_t)n) != n)
		_exit(3);
}

static void must(bool good, const char *what)
{
	if (!good) {
		fault("%s: %s\n", what, strerror(errno));
		_exit(2);
	}
}

static void check_page(const struct mapping *mapping, unsigned page)
{
	const uint64_t *words = mapping->at + (size_t)page * WORDS;
	const uint64_t number = mapping->first + page;
	const struct file *file = mapping->file;
	uint64_t low = UINT64_MAX, high = 0, done, begun;

	if (mapping->state[page] == OWN) {
		for (unsigned i = 0; i < WORDS; i++) {
			if (words[i] != mapping->own[page])
				fault("%s page %lu: %lx, which the program did not write\n", file->path, number, words[i]);
		}
		return;
	}
	done = file->replaced ? mapping->generation : atomic_load(&file->counters[1]);
	for (unsigned i = 0; i < WORDS; i++) {
		const uint64_t word = *(const volatile uint64_t *)&words[i];

		if ((word & 0xfffff) != number) {
			fault("%s page %lu: %lx is of another page\n", file->path, number, word);
			return;
		}
		low = word >> 20 < low ? word >> 20 : low;
		high = word >> 20 > high ? word >> 20 : high;
	}
	begun = file->replaced ? mapping->generation : atomic_load(&file->counters[0]);
	if (low < done || high > begun)
		fault("%s page %lu: generations %lu to %lu while %lu was done and %lu begun\n", file->path, number, low, high,
		      done, begun);
}

/* Children count for themselves, and what they counted ends with them. */
static void check(const struct mapping *mapping)
{
	unsigned long pages = 0;

	for (unsigned page = 0; mapping->at && page < mapping->pages; page++) {
		if (mapping->state[page] == GONE)
			continue;
		check_page(mapping, page);
		pages++;
	}
	atomic_fetch_add(&counts[10], pages);
}

static void drop(struct mapping *mapping)
{
	must(munmap(mapping->at, (size_t)mapping->pages * PAGE) == 0, "munmap");
	mapping->at = NULL;
}

static void make(struct thread *thread, struct mapping *mapping)
{
	const struct file *file = &files[pick(thread, nfiles)];
	const unsigned first = pick(thread, 2) ? 0 : pick(thread, file->pages);
	const unsigned pages = pick(thread, 2) ? file->pages - first : 1 + pick(thread, file->pages - first);
	const int fd = open(file->path, O_RDONLY | O_CLOEXEC);
	const int protection = pick(thread, 4) ? PROT_READ : PROT_READ | PROT_EXEC;
	uint64_t word;

	if (fd < 0 && errno == ENOENT)
		return; /* between two names */
	must(fd >= 0, "open");
	*mapping = (struct mapping){.pages = pages, .first = first, .file = file};
	must(pread(fd, &word, sizeof word, 0) == sizeof word, "pread");
	mapping->generation = word >> 20;
	mapping->at = mmap(NULL, (size_t)pages * PAGE, protection, MAP_PRIVATE, fd, (off_t)first * PAGE);
	must(mapping->at != MAP_FAILED, "mmap");
	must(close(fd) == 0, "close");
}

static void part_of(struct thread *thread, const struct mapping *mapping, unsigned *ret_first, unsigned *ret_pages)
{
	*ret_first = pick(thread, mapping->pages);
	*ret_pages = 1 + pick(thread, mapping->pages - *ret_first);
	if (pick(thread, 2))
		*ret_pages = 1;
}

static bool any_gone(const struct mapping *mapping)
{
	for (unsigned page = 0; page < mapping->pages; page++) {
		if (mapping->state[page] == GONE)
			return true;
	}
	return false;
}

static void protect(struct thread *thread, struct mapping *mapping)
{
	unsigned first, pages;
	uint8_t *at;

	part_of(thread, mapping, &first, &pages);
	at = (uint8_t *)mapping->at + (size_t)first * PAGE;
	if (any_gone(mapping))
		return;
	must(mprotect(at, (size_t)pages * PAGE, PROT_READ | PROT_WRITE) == 0, "mprotect");
	for (unsigned page = first; page < first + pages; page++) {
		if (pick(thread, 3))
			continue;
		mapping->state[page] = OWN;
		mapping->own[page] = thread->random;
		for (unsigned i = 0; i < WORDS; i++)
			mapping->at[(size_t)page * WORDS + i] = thread->random;
	}
	if (pick(thread, 4))
		must(mprotect(at, (size_t)pages * PAGE, PROT_READ) == 0, "mprotect back");
}

static void over(struct thread *thread, struct mapping *mapping)
{
	unsigned first, pages;
	uint8_t *at;

	part_of(thread, mapping, &first, &pages);
	at = (uint8_t *)mapping->at + (size_t)first * PAGE;
	must(mmap(at, (size_t)pages * PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == at, "mmap over");
	for (unsigned page = first; page < first + pages; page++) {
		mapping->state[page] = OWN;
		mapping->own[page] = 0;
	}
}

/* A mapping of one piece is made shorter, and perhaps longer again: what is behind its end is the file's. */
static void move(struct thread *thread, struct mapping *mapping)
{
	const unsigned pages = 1 + pick(thread, mapping->pages);
	void *there;

	for (unsigned page = 0; page < mapping->pages; page++) {
		if (mapping->state[page] != OF_FILE)
			return;
	}
	there = mremap(mapping->at, (size_t)mapping->pages * PAGE, (size_t)pages * PAGE, MREMAP_MAYMOVE);
	if (there == MAP_FAILED && errno == EFAULT)
		return; /* rights differ within it */
	must(there != MAP_FAILED, "mremap");
	mapping->at = there;
	mapping->pages = pages;
	if (pick(thread, 2)) {
		there = mremap(mapping->at, (size_t)pages * PAGE, (size_t)pages * PAGE, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, 0);
		if (there == MAP_FAILED)
			return; /* of more than one piece, or a kernel before 5.13 */
		check(mapping);
		must(munmap(mapping->at, (size_t)pages * PAGE) == 0, "munmap of the old place");
		mapping->at = there;
	}
}

static void advise(struct thread *thread, struct mapping *mapping)
{
	static const int kinds[] = {MADV_WILLNEED, MADV_RANDOM, MADV_SEQUENTIAL, MADV_NORMAL, MADV_COLD,
	                            MADV_PAGEOUT,  MADV_DONTDUMP, MADV_POPULATE_READ};
	unsigned first, pages;

	part_of(thread, mapping, &first, &pages);
	if (!any_gone(mapping))
		(void)madvise((uint8_t *)mapping->at + (size_t)first * PAGE, (size_t)pages * PAGE,
		              kinds[pick(thread, sizeof kinds / sizeof kinds[0])]);
	must(any_gone(mapping) || msync(mapping->at, (size_t)mapping->pages * PAGE, MS_SYNC) == 0, "msync");
}

static void fork_child(struct thread *thread)
{
	pid_t *slot = &thread->children[pick(thread, CHILDREN)];
	int status;

	if (*slot) {
		must(waitpid(*slot, &status, 0) == *slot, "waitpid");
		if (status)
			fault("a child ended with %x\n", (unsigned)status);
	}
	*slot = fork();
	must(*slot >= 0, "fork");
	if (*slot == 0) {
		const unsigned rounds = 1 + pick(thread, 3);

		atomic_store(&wrong, 0);
		for (unsigned i = 0; i < rounds; i++) {
			for (unsigned k = 0; k < MAPPINGS; k++)
				check(&thread->mappings[k]);
			usleep(pick(thread, 100000));
		}
		_exit(atomic_load(&wrong) ? 1 : 0);
	}
}

static void spawn(void)
{
	static char *const words[] = {"true", NULL};
	pid_t pid;
	int status;

	must(posix_spawn(&pid, "/bin/true", NULL, NULL, words, environ) == 0, "posix_spawn");
	must(waitpid(pid, &status, 0) == pid && status == 0, "waitpid");
}

static void on_alarm(int number)
{
	const int error = errno;
	void *at = mmap(NULL, 4 * PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	(void)number;
	must(at != MAP_FAILED && munmap(at, 4 * PAGE) == 0, "in a handler");
	atomic_fetch_add(&counts[9], 1);
	errno = error;
}

static void *work(void *argument)
{
	struct thread *thread = argument;

	while (!atomic_load(&ending)) {
		struct mapping *mapping = &thread->mappings[pick(thread, MAPPINGS)];
		const unsigned chance = pick(thread, 1000);
		unsigned what = 1;

		if (mapping->at == NULL) {
			make(thread, mapping);
			atomic_fetch_add(&counts[0], 1);
			continue;
		}
		if (chance < 3) {
			what = 2;
			drop(mapping);
		} else if (chance < 5) {
			what = 3;
			protect(thread, mapping);
		} else if (chance < 8) {
			what = 4;
			move(thread, mapping);
		} else if (chance < 11) {
			what = 5;
			advise(thread, mapping);
		} else if (chance < 12) {
			what = 6;
			fork_child(thread);
		} else if (chance < 13) {
			what = 7;
			spawn();
		} else if (chance < 14) {
			what = 8;
			over(thread, mapping);
		} else if (chance < 16) {
			const unsigned page = pick(thread, mapping->pages);

			what = 2;
			must(munmap(mapping->at + (size_t)page * WORDS, PAGE) == 0, "munmap of a page");
			/* Another thread may map there now, so the hole is filled at once; or the whole is given up. */
			must(munmap(mapping->at, (size_t)page * PAGE) == 0 || page == 0, "munmap of the front");
			if (page + 1 < mapping->pages)
				must(munmap(mapping->at + (size_t)(page + 1) * WORDS,
				            (size_t)(mapping->pages - page - 1) * PAGE) == 0,
				     "munmap of the end");
			mapping->at = NULL;
		} else {
			check(mapping);
		}
		atomic_fetch_add(&counts[what], 1);
	}
	return NULL;
}

static void learn(char *words)
{
	struct file *file = &files[nfiles++];
	char *rest = NULL;
	const char *kind = strtok_r(words, ":", &rest);
	const char *pages = strtok_r(NULL, ":", &rest);
	int fd;

	file->path = strtok_r(NULL, ":", &rest);
	file->replaced = kind && *kind == 'r';
	file->pages = pages ? (unsigned)strtoul(pages, NULL, 10) : 0;
	must(file->pages > 0 && file->pages <= MOST_PAGES && file->path && rest, "the words of a file");
	fd = open(rest, O_RDONLY | O_CLOEXEC);
	must(fd >= 0, "open counters");
	file->counters = mmap(NULL, 16, PROT_READ, MAP_SHARED, fd, 0);
	must(file->counters != MAP_FAILED && close(fd) == 0, "map counters");
}

int main(int argc, char **argv)
{
	static struct thread threads[THREADS];
	static pthread_t ids[THREADS];
	const unsigned n = argc > 2 ? (unsigned)strtoul(argv[2], NULL, 10) : 0;
	const struct sigaction action = {.sa_handler = on_alarm, .sa_flags = SA_RESTART};
	struct timespec pause = {0, 2000000};
	char byte;

	must(n > 0 && n <= THREADS && argc > 3 && argc - 3 <= FILES, "usage: stress SEED THREADS FILE...");
	for (int i = 3; i < argc; i++)
		learn(argv[i]);
	must(sigaction(SIGUSR1, &action, NULL) == 0, "sigaction");
	for (unsigned i = 0; i < n; i++) {
		threads[i].random = strtoul(argv[1], NULL, 10) * 1000003 + i;
		must(pthread_create(&ids[i], NULL, work, &threads[i]) == 0, "pthread_create");
	}
	must(fcntl(0, F_SETFL, O_NONBLOCK) == 0, "fcntl");
	for (unsigned i = 0; read(0, &byte, 1) != 0; i++) {
		nanosleep(&pause, NULL);
		must(pthread_kill(ids[i % n], SIGUSR1) == 0, "pthread_kill");
	}
	atomic_store(&ending, true);
	for (unsigned i = 0; i < n; i++) {
		must(pthread_join(ids[i], NULL) == 0, "pthread_join");
		for (unsigned k = 0; k < CHILDREN; k++) {
			int status = 0;

			if (threads[i].children[k] && waitpid(threads[i].children[k], &status, 0) > 0 && status)
				fault("a child ended with %x\n", (unsigned)status);
		}
	}
	printf("{\"wrong\": %lu", atomic_load(&wrong));
	for (unsigned i = 0; i < sizeof names / sizeof names[0]; i++)
		printf(", \"%s\": %lu", names[i], atomic_load(&counts[i]));
	printf("}\n");
	return atomic_load(&wrong) ? 1 : 0;
}

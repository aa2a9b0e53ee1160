/*
 * shim_look.c - what is mapped here: reads /proc/self/maps, and says which mappings of files become regions.
 *
 * Where a mapping comes from decides. What is there at the start never goes away; of what the program maps preload.c
 * hears, also when it goes; a library that ld.so loads later is taken when it has stayed for a while. What regions are
 * used for is left to others.
 */
#include "shim_parts.h"

#include <limits.h>
#include <link.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sysmacros.h>

enum { MAX_LATE = 1024 };

/* A mapping that may be a library's, since when it has been seen. */
struct late {
	uintptr_t start;
	uint64_t ino;
	int64_t since;
	bool seen;
};

static bool whole_program; /* not only what it says that it has mapped */
static char line_buffer[PATH_MAX + 256];
static char read_buffer[16384];

/* ----------------------------------------------------------------------------------------------- reading /proc */

bool sa_is_unfiltered(void)
{
	static const char want[] = "\nSeccomp:\t0\n";
	int fd = sa_open_read("/proc/self/status");
	size_t n = 0;
	long got;

	if (fd < 0)
		return false;
	while (n < sizeof read_buffer && (got = sa_read_some(fd, read_buffer + n, sizeof read_buffer - n)) > 0)
		n += (size_t)got;
	sa_close_fd(&fd);
	for (size_t i = 0; i + sizeof want - 1 <= n; i++) {
		if (memcmp(read_buffer + i, want, sizeof want - 1) == 0)
			return true;
	}
	return false;
}

static const char *take_hex(const char *text, uint64_t *ret)
{
	*ret = 0;
	for (;; text++) {
		const char c = *text;

		if (c >= '0' && c <= '9')
			*ret = *ret << 4 | (uint64_t)(c - '0');
		else if (c >= 'a' && c <= 'f')
			*ret = *ret << 4 | (uint64_t)(c - 'a' + 10);
		else
			return text;
	}
}

static bool ends_with(const char *text, const char *end)
{
	const size_t n = strlen(text);
	const size_t m = strlen(end);

	return n >= m && memcmp(text + n - m, end, m) == 0;
}

/* A line of /proc/self/maps, if it is a mapping of a file that nobody can write through. Whether it is private or not makes
 * no difference then: a lease on the file is had only while nobody has it open for writing. */
static bool parse_line(const char *text, struct line *ret)
{
	uint64_t start, end, offset, major, minor, ino = 0;
	const char *rights;

	text = take_hex(text, &start);
	text = take_hex(text + (*text == '-'), &end);
	if (*text != ' ' || end <= start)
		return false;
	rights = text + 1;
	if (rights[0] != 'r' || rights[1] != '-' || (rights[2] != '-' && rights[2] != 'x') ||
	    (rights[3] != 'p' && rights[3] != 's'))
		return false;
	text = take_hex(rights + 5, &offset);
	text = take_hex(text + (*text == ' '), &major);
	text = take_hex(text + (*text == ':'), &minor);
	for (text += *text == ' '; *text >= '0' && *text <= '9'; text++)
		ino = ino * 10 + (uint64_t)(*text - '0');
	while (*text == ' ')
		text++;
	if (ino == 0 || *text != '/' || offset % PAGE != 0 || end - start < MIN_PAGES * PAGE)
		return false;
	if (ends_with(text, " (deleted)") || ends_with(text, "/libsharearea_preload.so") || strstr(text, "/gconv/"))
		return false;
	*ret = (struct line){
		.region = {.start = start,
	                   .length = end - start,
	                   .first = offset / PAGE,
	                   .dev = makedev((unsigned)major, (unsigned)minor),
	                   .ino = ino,
	                   .file = NO_FILE,
	                   .protection = rights[2] == 'x' ? PROT_READ | PROT_EXEC : PROT_READ},
		.executable = rights[2] == 'x',
		.path = text,
	};
	return true;
}

void sa_maps_walk(bool (*visit)(const struct line *line))
{
	int fd = sa_open_read("/proc/self/maps");
	size_t length = 0;
	bool whole = true;
	long got;

	if (fd < 0)
		return;
	while ((got = sa_read_some(fd, read_buffer, sizeof read_buffer)) > 0) {
		for (long i = 0; i < got; i++) {
			struct line line;

			if (read_buffer[i] != '\n') {
				if (length < sizeof line_buffer - 1)
					line_buffer[length++] = read_buffer[i];
				else
					whole = false;
				continue;
			}
			line_buffer[length] = 0;
			length = 0;
			if (whole && parse_line(line_buffer, &line) && !visit(&line)) {
				sa_close_fd(&fd);
				return;
			}
			whole = true;
		}
	}
	sa_close_fd(&fd);
}

/* --------------------------------------------------------------------------------------------- what is learned */

static bool learn_at_start(const struct line *line)
{
	struct region region = line->region;

	region.origin = ORIGIN_START;
	sa_region_add(&region);
	return true;
}

void sa_look_begin(bool whole)
{
	whole_program = whole;
	if (whole)
		sa_maps_walk(learn_at_start);
}

static bool linker_rests(void)
{
	return *(volatile int *)&_r_debug.r_state == RT_CONSISTENT;
}

/* A library is several mappings of one file after the other, one of them executable. Remembered: the file of the line
 * before, and where its mappings begin in `late`. */
static uint64_t run_ino;
static uintptr_t run_end;
static bool run_executable;
static struct region run[8];
static size_t run_length;
static int64_t look_time;
static struct late late[MAX_LATE]; /* since 0: none */

/* The mappings of a library that was dlopened: shared when seen for long enough. */
static void end_run(void)
{
	for (size_t i = 0; run_executable && i < run_length; i++) {
		struct late *free = NULL;
		struct late *found = NULL;

		for (size_t k = 0; k < MAX_LATE && !found; k++) {
			if (late[k].since && late[k].start == run[i].start && late[k].ino == run[i].ino)
				found = &late[k];
			else if (late[k].since == 0)
				free = &late[k];
		}
		if (!found && free) {
			*free = (struct late){
				.start = run[i].start, .ino = run[i].ino, .since = look_time, .seen = true};
		} else if (found) {
			found->seen = true;
			if (look_time - found->since >= MS_LATE && !sa_regions_are_closing() && linker_rests()) {
				run[i].origin = ORIGIN_LATE;
				sa_region_add(&run[i]);
			}
		}
	}
	run_length = 0;
	run_executable = false;
}

static bool learn_later(const struct line *line)
{
	struct region region = line->region;

	if (run_length && (run_ino != region.ino || run_end != region.start))
		end_run();
	if (sa_region_is_known(&region))
		return true;
	if (sa_region_is_noted(&region)) {
		region.origin = ORIGIN_PROGRAM;
		sa_region_add(&region);
		return true;
	}
	if (!whole_program)
		return true;
	run_ino = region.ino;
	run_end = sa_region_end(&region);
	run_executable = run_executable || line->executable;
	if (run_length < sizeof run / sizeof run[0])
		run[run_length++] = region;
	return true;
}

void sa_look(void)
{
	atomic_store(&sa_dirty, false);
	look_time = sa_now_ms();
	for (size_t i = 0; i < MAX_LATE; i++)
		late[i].seen = false;
	sa_lock();
	sa_maps_walk(learn_later);
	end_run();
	sa_unlock();
	for (size_t i = 0; i < MAX_LATE; i++) {
		if (!late[i].seen)
			late[i].since = 0;
	}
}

void sa_look_forget(void)
{
	memset(late, 0, sizeof late);
}

/*
 * check.h - what the native tests share: CHECK counts and reports, check_done says the last word. A test is one program
 * that runs CHECKs and returns check_done(name); which tests run, and with which sanitizer, is the build's business.
 */
#ifndef CHECK_H
#define CHECK_H

#include <stdio.h>

static size_t check_count;
static size_t check_failures;

/* Counts; reports a failure and goes on. Its value is 1 when the condition holds, so that a test can leave early:
 * if (!CHECK(p)) return; */
#define CHECK(condition) check_that((condition) ? 1 : 0, #condition, __FILE__, __LINE__)

static inline int check_that(int holds, const char *text, const char *file, int line)
{
	check_count++;
	if (!holds) {
		check_failures++;
		fprintf(stderr, "%s:%d: failed: %s\n", file, line, text);
	}
	return holds;
}

/* The exit code of the test, after one line about it. */
static inline int check_done(const char *name)
{
	if (check_failures > 0) {
		fprintf(stderr, "FAILED %s: %zu of %zu checks\n", name, check_failures, check_count);
		return 1;
	}
	printf("ok %s %zu checks\n", name, check_count);
	return 0;
}

#endif

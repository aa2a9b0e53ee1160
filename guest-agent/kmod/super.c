// SPDX-License-Identifier: GPL-2.0-only
/*
 * shareview: mounting, unmounting, loading, and what is to be done before a suspend.
 *
 *   mount -t shareview -o lower=DIR[,verify=resident|all] none MNT
 */
#include <linux/fs_context.h>
#include <linux/fs_parser.h>
#include <linux/module.h>
#include <linux/mount.h>
#include <linux/namei.h>
#include <linux/platform_device.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include <linux/statfs.h>
#include <xen/xen.h>

#include "internal.h"

static struct file_system_type sv_type;

/* ------------------------------------------------------------------------------------- options */

struct sv_options {
	char *lower;
	bool verify_all;
};

enum { SV_LOWER, SV_VERIFY };

static const struct constant_table sv_verify_words[] = {
	{ "resident", false },
	{ "all", true },
	{}
};

static const struct fs_parameter_spec sv_parameters[] = {
	fsparam_string("lower", SV_LOWER),
	fsparam_enum("verify", SV_VERIFY, sv_verify_words),
	{}
};

static int sv_parse_param(struct fs_context *fc, struct fs_parameter *param)
{
	struct sv_options *options = fc->fs_private;
	struct fs_parse_result result;
	int option = fs_parse(fc, sv_parameters, param, &result);

	if (option < 0)
		return option;
	if (fc->purpose == FS_CONTEXT_FOR_RECONFIGURE)
		return invalfc(fc, "options cannot be changed by a remount");
	if (option == SV_VERIFY) {
		options->verify_all = result.uint_32;
		return 0;
	}
	kfree(options->lower);
	options->lower = param->string;
	param->string = NULL;
	return 0;
}

/* ----------------------------------------------------------------------------------- the mount */

static int sv_statfs(struct dentry *dentry, struct kstatfs *ret)
{
	struct path lower;

	sv_lower_path(dentry, &lower);
	return vfs_statfs(&lower, ret);
}

static int sv_show_options(struct seq_file *out, struct dentry *root)
{
	const struct sv_super *super = sv_super(root->d_sb);

	seq_show_option(out, "lower", super->lower_text);
	if (super->verify_all)
		seq_puts(out, ",verify=all");
	return 0;
}

static const struct super_operations sv_super_operations = {
	.alloc_inode = sv_alloc_inode,
	.free_inode = sv_free_inode,
	.evict_inode = sv_evict_inode,
	.statfs = sv_statfs,
	.show_options = sv_show_options,
};

/* A lower folder whose names mean something else than the names that are looked up is refused. */
static int sv_check_lower(struct fs_context *fc, const struct path *lower)
{
	const unsigned int strange = DCACHE_NEED_AUTOMOUNT | DCACHE_MANAGE_TRANSIT |
				     DCACHE_OP_HASH | DCACHE_OP_COMPARE | DCACHE_OP_REVALIDATE;

	if (lower->dentry->d_sb->s_type == &sv_type)
		return invalfc(fc, "lower is a view itself");
	if (lower->dentry->d_flags & strange)
		return invalfc(fc, "lower is on a network, ignores case, or mounts by itself");
	if (is_idmapped_mnt(lower->mnt))
		return invalfc(fc, "lower is on a mount that maps owners");
	if (lower->dentry->d_sb->s_stack_depth >= FILESYSTEM_MAX_STACK_DEPTH)
		return invalfc(fc, "lower is stacked too deep");
	return 0;
}

static int sv_fill_super(struct super_block *sb, struct fs_context *fc)
{
	struct sv_options *options = fc->fs_private;
	struct super_block *lower_sb;
	struct sv_super *super;
	struct inode *inode;
	int err;

	super = kzalloc(sizeof(*super), GFP_KERNEL_ACCOUNT);
	if (!super)
		return -ENOMEM;
	sb->s_fs_info = super; /* sv_kill_sb frees it, however far we come */
	super->verify_all = options->verify_all;
	super->lower_text = options->lower;
	options->lower = NULL;
	err = kern_path(super->lower_text, LOOKUP_FOLLOW | LOOKUP_DIRECTORY, &super->lower);
	if (err) {
		errorfc(fc, "lower: no such folder");
		return err;
	}
	err = sv_check_lower(fc, &super->lower);
	if (err)
		return err;
	lower_sb = super->lower.dentry->d_sb;
	sb->s_stack_depth = lower_sb->s_stack_depth + 1;
	sb->s_magic = SV_MAGIC;
	sb->s_blocksize = lower_sb->s_blocksize; /* FIGETBSZ says it */
	sb->s_blocksize_bits = lower_sb->s_blocksize_bits;
	sb->s_maxbytes = lower_sb->s_maxbytes;
	sb->s_time_gran = lower_sb->s_time_gran;
	sb->s_flags |= SB_RDONLY | SB_NOATIME;
	sb->s_iflags |= SB_I_NODEV;
	if ((super->lower.mnt->mnt_flags & MNT_NOEXEC) || (lower_sb->s_iflags & SB_I_NOEXEC))
		sb->s_iflags |= SB_I_NOEXEC;
	sb->s_op = &sv_super_operations;
	sb->s_xattr = sv_xattr_handlers;
	sb->s_d_op = &sv_dentry_operations;
	inode = sv_iget(sb, d_inode(super->lower.dentry));
	if (IS_ERR(inode))
		return PTR_ERR(inode);
	sb->s_root = d_make_root(inode);
	if (!sb->s_root)
		return -ENOMEM;
	sb->s_root->d_fsdata = dget(super->lower.dentry);
	return 0;
}

static void sv_kill_sb(struct super_block *sb)
{
	struct sv_super *super = sv_super(sb);

	if (super)
		sv_detach_all(sb);
	kill_anon_super(sb);
	if (!super)
		return;
	path_put(&super->lower);
	kfree(super->lower_text);
	kfree(super);
}

static int sv_get_tree(struct fs_context *fc)
{
	struct sv_options *options = fc->fs_private;

	if (!options->lower)
		return invalfc(fc, "lower= is missing");
	fc->sb_flags |= SB_RDONLY;
	return get_tree_nodev(fc, sv_fill_super);
}

static int sv_reconfigure(struct fs_context *fc)
{
	if (!(fc->sb_flags & SB_RDONLY) && (fc->sb_flags_mask & SB_RDONLY))
		return -EROFS;
	return 0;
}

static void sv_free_context(struct fs_context *fc)
{
	struct sv_options *options = fc->fs_private;

	kfree(options->lower);
	kfree(options);
}

static const struct fs_context_operations sv_context_operations = {
	.parse_param = sv_parse_param,
	.get_tree = sv_get_tree,
	.reconfigure = sv_reconfigure,
	.free = sv_free_context,
};

static int sv_init_context(struct fs_context *fc)
{
	struct sv_options *options = kzalloc(sizeof(*options), GFP_KERNEL_ACCOUNT);

	if (!options)
		return -ENOMEM;
	fc->fs_private = options;
	fc->ops = &sv_context_operations;
	return 0;
}

static struct file_system_type sv_type = {
	.owner = THIS_MODULE,
	.name = "shareview",
	.init_fs_context = sv_init_context,
	.parameters = sv_parameters,
	.kill_sb = sv_kill_sb,
};
MODULE_ALIAS_FS("shareview");

/* ------------------------------------------------------------------------------------- suspend */

static int sv_freeze(struct device *device)
{
	return sv_suspend();
}

/* `xl save` and `xl migrate` freeze; so does a guest that hibernates. */
static const struct dev_pm_ops sv_pm_operations = {
	.suspend = sv_freeze,
	.freeze = sv_freeze,
};

static struct platform_driver sv_driver = {
	.driver = {
		.name = "shareview",
		.pm = &sv_pm_operations,
	},
};

static struct platform_device *sv_device;

/* -------------------------------------------------------------------------------------- module */

static int __init sv_init_device(void)
{
	int err = platform_driver_register(&sv_driver);

	if (err)
		return err;
	sv_device = platform_device_register_simple("shareview", PLATFORM_DEVID_NONE, NULL, 0);
	err = PTR_ERR_OR_ZERO(sv_device);
	if (err)
		platform_driver_unregister(&sv_driver);
	return err;
}

static void sv_exit_device(void)
{
	platform_device_unregister(sv_device);
	platform_driver_unregister(&sv_driver);
}

static int __init sv_init(void)
{
	int err;

	if (!xen_domain())
		return -ENODEV;
	err = sv_tables_init();
	if (err)
		return err;
	err = sv_inode_cache_create();
	if (err)
		goto tables;
	err = sv_init_device();
	if (err)
		goto cache;
	err = sv_control_init();
	if (err)
		goto device;
	err = register_filesystem(&sv_type);
	if (!err)
		return 0;
	sv_control_exit();
device:
	sv_exit_device();
cache:
	sv_inode_cache_destroy();
tables:
	sv_tables_exit();
	return err;
}

static void __exit sv_exit(void)
{
	unregister_filesystem(&sv_type);
	sv_control_exit();
	sv_exit_device();
	sv_inode_cache_destroy();
	sv_tables_exit();
}

module_init(sv_init);
module_exit(sv_exit);
MODULE_DESCRIPTION("Read-only view of a folder whose files may have granted pages attached");
MODULE_LICENSE("GPL");
MODULE_VERSION("1");

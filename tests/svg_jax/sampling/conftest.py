import pytest


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory):
    """By family what makes both libraries' pipelines of a variant, and the converted folder."""
    import cogvideox_pipelines
    import hunyuan_video_pipelines
    import wan_pipelines
    from tiny_pipelines import both_of_each

    return {
        "CogVideoX": both_of_each(tmp_path_factory, cogvideox_pipelines.write_checkpoint),
        "HunyuanVideo": both_of_each(tmp_path_factory, hunyuan_video_pipelines.write_checkpoint),
        "Wan": both_of_each(tmp_path_factory, wan_pipelines.write_checkpoint),
    }
